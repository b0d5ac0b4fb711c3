"""`tersor train zipr1`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor._lazy import require
from tersor._options import FOLDER


def zipr1(
    model: Annotated[str, typer.Option(help="Vision-language checkpoint: a folder, a hub name or a zoo name.")],
    data: Annotated[
        str,
        typer.Option(
            help="Questions: a .jsonl of question, answer and image; a folder of Dataset.save_to_disk; or a hub name, "
            "with :split after it."
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar=FOLDER, help="Folder of checkpoints, report and model; an interrupted run resumes.")
    ],
    steps: Annotated[int, typer.Option(help="Updates of the weights.")] = 200,
    held_out: Annotated[int, typer.Option(help="Questions of the data that are kept for the report.")] = 200,
    verifier: Annotated[
        str, typer.Option(help="'exact', 'choice', 'number', 'number:0.05' for a tolerance, or your module:function.")
    ] = "exact",
    questions: Annotated[int, typer.Option(help="Questions of an update and process.")] = 4,
    thresholds: Annotated[
        str, typer.Option(help="ZipVL's tau of the rollouts of a question, with commas between them.")
    ] = "0.94,0.945,0.95,0.955,0.96,0.965,0.97,0.975",
    eval_threshold: Annotated[float, typer.Option(help="ZipVL's tau in use.")] = 0.975,
    objective: Annotated[
        str,
        typer.Option(
            help="'pathwise' is the paper's objective with its complete gradient, 'literal' the paper's estimator, "
            "'entropy' a proxy."
        ),
    ] = "pathwise",
    efficiency_weight: Annotated[float, typer.Option(help="Of saved tokens against a right answer.")] = 1.0,
    beta: Annotated[float, typer.Option(help="Weight of the divergence from the dense model.")] = 0.04,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of AdamW; 1e-6 without it, 1e-5 with --lora.", show_default=False)
    ] = None,
    lora: Annotated[int, typer.Option(help="Rank of adapters to train instead of all weights; 0 trains those.")] = 0,
    train_vision: Annotated[
        bool, typer.Option("--train-vision", help="Train the vision tower, too; it changes no token count.")
    ] = False,
    max_completion_length: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 32,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of ZipVL, such as skip_layers=0, or --skip-layers 0; may be repeated."),
    ] = None,
    save_every: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 50,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")
    ] = False,
    float32: Annotated[bool, typer.Option("--float32", help="No bfloat16 on a GPU either.")] = False,
    seed: Annotated[int, typer.Option(help="Of order and sampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Teach a vision-language model to need fewer tokens (ZipR1); on many GPUs by `accelerate launch -m tersor …`.

    Example: tersor train zipr1 --model path/to/Qwen2.5-VL --data train.jsonl --out run/ --lora 16
    """
    from tersor.rl.verifiers import find_verifier

    for name, least, value in (
        ("--steps", 1, steps), ("--held-out", 1, held_out), ("--questions", 1, questions), ("--lora", 0, lora),
        ("--save-every", 1, save_every), ("--max-completion-length", 1, max_completion_length),
    ):  # fmt: skip
        if value < least:
            raise TersorError(f"{name} {value} must be at least {least}")
    rate = learning_rate if learning_rate is not None else 1e-5 if lora else 1e-6
    if rate <= 0:
        raise TersorError(f"--learning-rate {rate} must be above 0")
    grid = _thresholds(thresholds)
    judge = find_verifier(verifier)
    require("trl", "rl")
    from tersor.kv.settings import recipe_from_text
    from tersor.rl.data import check_prompts, load_questions
    from tersor.zoo import loading

    if any(setting.partition("=")[0].strip() == "tau" for setting in settings or []):
        raise TersorError("--set tau is not for a training: --thresholds are its tau, --eval-threshold that in use")
    recipe: Any = recipe_from_text("zipvl", settings or [])
    location = loading.resolve(model)
    if Path(location).is_dir() and not loading.is_multimodal(location):
        raise TersorError(f"--model {model} reads no pictures; give a vision-language model")
    with spinner() as status:
        status.update("loading trl")
        import torch

        from tersor.rl.config import ZipR1Config
        from tersor.rl.policy import load_policy
        from tersor.rl.run import run_zipr1
    own = {name: value for name, value in asdict(recipe).items() if name != "tau"}
    plan = ZipR1Config(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=len(grid), num_generations=len(grid),
        gradient_accumulation_steps=questions, thresholds=grid, eval_threshold=eval_threshold, objective=objective,  # type: ignore[arg-type]
        efficiency_weight=efficiency_weight, beta=beta, learning_rate=rate,
        max_completion_length=max_completion_length, zipvl=own, save_steps=save_every, save_total_limit=2,
        gradient_checkpointing=gradient_checkpointing, bf16=False if float32 else None, seed=seed, report_to=[],
        disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    rows = load_questions(data)
    if held_out >= len(rows):
        raise TersorError(f"--held-out {held_out} leaves nothing of the {len(rows)} questions of --data to train on")
    processor = loading.load_processor(location)
    check_prompts(rows, processor, recipe.min_tokens)
    parts = rows.train_test_split(test_size=held_out, seed=seed)
    # Frozen weights need no float32 on a GPU.
    half = lora > 0 and not float32 and torch.cuda.is_available()
    policy = load_policy(location, train_vision=train_vision, dtype=torch.bfloat16 if half else torch.float32)
    told = run_zipr1(
        policy, processor, parts["train"], parts["test"], judge, plan,
        facts={"model": model, "data": data, "verifier": verifier, "lora": lora, "train_vision": train_vision},
        peft_config=_adapters(lora), quiet=as_json or not sys.stderr.isatty(),
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(told))
        return
    for name in ("before", "after"):
        each = next(row for row in told[name] if row["tau"] == eval_threshold)
        typer.echo(f"{name}: {each['token_ratio']:.1%} of the tokens, {each['accuracy']:.1%} right (n={each['n']})")
    typer.echo(f"{out / 'model'}; report: {out / 'report.html'}")


def _thresholds(text: str) -> list[float]:
    try:
        grid = [float(part) for part in text.split(",")]
    except ValueError:
        grid = []
    if len(grid) < 2 or grid != sorted(grid) or not all(0 < tau <= 1 for tau in grid):
        raise TersorError(
            f"--thresholds {text!r} must be at least two shares above 0 and at most 1, in ascending order, with commas "
            "between them"
        )
    return grid


def _adapters(rank: int) -> Any:
    if not rank:
        return None
    peft: Any = require("peft", "rl")
    return peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=r".*(visual|vision).*",
        task_type="CAUSAL_LM",
    )  # fmt: skip

"""`tersor train intjudge`, and `tersor opening references`."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor._lazy import require
from tersor._options import FOLDER
from tersor.opening.told import Json, Run, tell


def references(
    run: Run,
    model: Annotated[
        list[str],
        typer.Option(help="As of `tersor opening generate`; may be repeated. The gold answer itself is none."),
    ],
    images: Annotated[str | None, typer.Option(help="Draws for chat:, as of `tersor opening generate`.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Of endpoints, with or without /v1.")] = None,
    key_env: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "OPENAI_API_KEY",
    device: Annotated[str, typer.Option(help="Of checkpoints.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    as_json: Json = False,
) -> None:
    """Pairs that need no votes: each model answers with and without the gold answer at hand, and the former wins.

    RUN must be a run of its own, from `tersor opening init`, for its battles are no comparison of models.

    Example: tersor opening references pairs --model scripted:medium --model scripted:weak
    """
    require("PIL.Image", "arena")
    from tersor.opening.generators.specs import GeneratorOptions, generator_of
    from tersor.opening.intjudge.references import JUDGE, write_references
    from tersor.opening.store import Store

    options = GeneratorOptions(images=images, base_url=base_url, key_env=key_env, device=device)
    generators = [generator_of(each, options) for each in model]
    facts: dict[str, Any] = {}
    with Store.open(run) as store, spinner() as status:
        if others := [each for each in store.judges() if each != JUDGE]:
            raise TersorError(f"{run} has battles that {others[0]} decided; give a run of its own for references")
        for each in generators:
            facts[each.name] = write_references(
                store, each, seed=seed,
                on_progress=lambda done, of, name=each.name: status.update(f"{name}: {done} of {of}"),  # type: ignore[misc]
            )  # fmt: skip
    said = "\n".join(f"{name}: {count} pairs" for name, count in facts.items())
    tell(as_json, {"pairs": facts}, said, f"report {run} --judge {JUDGE}")


def intjudge(
    model: Annotated[str, typer.Option(help="Vision-language checkpoint: a folder, a hub name or a zoo name.")],
    out: Annotated[
        Path, typer.Option(metavar=FOLDER, help="Folder of checkpoints, report and adapter; a stopped run resumes.")
    ],
    arena: Annotated[list[Path], typer.Option(help="A run whose battles are decided; may be repeated.")],
    reference_runs: Annotated[
        list[Path] | None,
        typer.Option("--references", help="A run of `tersor opening references`; may be repeated."),
    ] = None,
    judge: Annotated[str, typer.Option(help="Whose verdicts the arena's are.")] = "human",
    unseen: Annotated[
        list[str] | None, typer.Option(help="A contestant to keep out of the training; may be repeated.")
    ] = None,
    held_out: Annotated[float, typer.Option(help="Share of the instances to validate on.")] = 0.2,
    ratio: Annotated[float, typer.Option(help="Pairs from references for one of the arena, at most.")] = 4.0,
    epochs: Annotated[float, typer.Option(help="Times that each pair is read in both orders.")] = 3.0,
    steps: Annotated[int, typer.Option(help="Updates instead of epochs; 0 goes by those.")] = 0,
    batch: Annotated[int, typer.Option(help="Rows of a forward and process, an even number.")] = 2,
    accumulate: Annotated[int, typer.Option(help="Forwards of an update.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak of AdamW's cosine.")] = 1e-4,
    lora: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    qlora: Annotated[bool, typer.Option("--qlora", help="Keep the frozen weights in 4 bits (bitsandbytes).")] = False,
    rank_weight: Annotated[float, typer.Option(help="Of the ranking loss, softplus(-y s).")] = 0.0,
    swap_weight: Annotated[float, typer.Option(help="Of the swap-consistency loss, (s(A,B) + s(B,A))^2.")] = 0.0,
    no_swap_augment: Annotated[
        bool, typer.Option("--no-swap-augment", help="Read each pair in one order alone.")
    ] = False,
    judge_prompt: Annotated[
        Path | None, typer.Option(help="File of the system message and, after a line '---', the question.")
    ] = None,
    side: Annotated[int, typer.Option(help="Longest side of a picture, in pixels.")] = 512,
    save_every: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 50,
    no_checkpointing: Annotated[
        bool, typer.Option("--no-checkpointing", help="Keep activations: faster, and more memory.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of split, order and adapters.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Train a judge of answers in text and pictures on battles that were decided (IntJudge), and say what it is worth.

    Example: tersor train intjudge --model Qwen/Qwen2-VL-7B-Instruct --arena run/ --references pairs/ --out judge/
    """
    for name, least, value in (
        ("--steps", 0, steps), ("--batch", 1, batch), ("--accumulate", 1, accumulate), ("--lora", 1, lora),
        ("--save-every", 1, save_every), ("--ratio", 0, ratio),
    ):  # fmt: skip
        if not value >= least:
            raise TersorError(f"{name} {value} must be at least {least}")
    if not 0 < held_out < 1 or not epochs > 0 or not learning_rate > 0:
        raise TersorError(
            f"--held-out {held_out} must be inside (0, 1), and --epochs {epochs} and --learning-rate {learning_rate} "
            "above 0"
        )
    require("trl", "rl")
    require("PIL.Image", "arena")
    from tersor.opening.intjudge.pairs import read_source, split
    from tersor.opening.intjudge.references import JUDGE
    from tersor.opening.prompts import read_prompt
    from tersor.opening.store import Store
    from tersor.zoo import loading

    prompt = read_prompt(judge_prompt, side=side)
    location = loading.resolve(model)
    if Path(location).is_dir() and not loading.is_multimodal(location):
        raise TersorError(f"--model {model} reads no pictures; give a vision-language model")
    with ExitStack() as stack:
        named = [("arena", judge, each) for each in arena]
        named += [("reference", JUDGE, each) for each in reference_runs or ()]
        sources = [
            read_source(stack.enter_context(Store.open(run)), who, kind)  # type: ignore[arg-type]
            for kind, who, run in named
        ]
    parts = split(sources, unseen=unseen or (), held_out=held_out, ratio=ratio, seed=seed)
    for why, count in parts.dropped.items():
        typer.echo(f"tersor: note: left out: {count} x {why}", err=True)
    with spinner() as status:
        status.update("loading trl")
        from tersor.opening.intjudge.config import IntJudgeConfig
        from tersor.opening.intjudge.lora import adapters, load_base
        from tersor.opening.intjudge.run import run_intjudge
    plan = IntJudgeConfig(
        output_dir=str(out), max_steps=steps or -1, num_train_epochs=epochs, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate, learning_rate=learning_rate, rank_weight=rank_weight,
        swap_weight=swap_weight, both_orders=not no_swap_augment, save_steps=save_every, save_total_limit=2,
        gradient_checkpointing=not no_checkpointing, seed=seed, report_to=[], disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    told = run_intjudge(
        load_base(location, four_bits=qlora), loading.load_processor(location), parts, plan, prompt,
        facts={"model": model, "lora": lora, "qlora": qlora}, unseen=unseen or (), peft_config=adapters(lora),
        quiet=as_json or not sys.stderr.isatty(),
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(told, allow_nan=False))
        return
    for name in ("before", "after"):
        found = told[name]["agreement"]["fdt"]["average"]
        typer.echo(
            f"{name}: agrees in {found['value']:.1%} [{found['low']:.1%}, {found['high']:.1%}] of "
            f"{told['pairs']['validation']} battles"
        )
    typer.echo(f"judge: {out / 'adapter'}\nnext: tersor opening judge RUN --judge hf:{out / 'adapter'}")

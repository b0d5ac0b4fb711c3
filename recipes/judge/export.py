"""Checkpoint folder, adapter, lock file and model card of tiny-judge."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from judge.base import Trainer
from shared.lock import Lock, write_lock

from tersor.bench.runs import markdown
from tersor.opening.intjudge.config import IntJudgeConfig
from tersor.opening.intjudge.lora import adapters
from tersor.opening.intjudge.pairs import split
from tersor.opening.intjudge.report import percent
from tersor.opening.intjudge.run import run_intjudge
from tersor.opening.intjudge.world import PROMPT, SEEN, UNSEEN, World
from tersor.zoo import loading

NAME = "tiny-judge"
#: Seed of the world; tests, benchmarks and the demo have others.
WORLD = 4321


@dataclass(frozen=True)
class JudgePlan:
    """The training of the adapter: tasks, votes and pairs from references for each, and updates."""

    instances: int = 700
    battles: int = 600
    ratio: float = 4.0
    steps: int = 150
    rows: int = 32
    rank: int = 32
    learning_rate: float = 2e-3


SMOKE = JudgePlan(instances=16, battles=60, steps=1, rows=4)


def export_base(trainer: Trainer, out: Path) -> None:
    """Write the base in bfloat16, as the adapter is trained on it."""
    rounded = trainer.model.to(torch.bfloat16)
    rounded.generation_config.do_sample = False
    rounded.save_pretrained(out)
    trainer.processor.save_pretrained(out)


def train_judge(base: Path, plan: JudgePlan, seed: int, out: Path, *, save_every: int) -> dict[str, Any]:
    """Train the adapter on the scripted world in ``out``; returns what its report says."""
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    world, unseen = World(out / "pictures", WORLD), [each.name for each in UNSEEN]
    instances = world.instances(plan.instances)
    sources = [world.arena(instances, (*SEEN, *UNSEEN), plan.battles), world.references(instances, SEEN)]
    parts = split(sources, unseen=unseen, held_out=0.2, ratio=plan.ratio, seed=seed)
    config = IntJudgeConfig(
        output_dir=str(out / "run"), max_steps=plan.steps, per_device_train_batch_size=plan.rows, seed=seed,
        learning_rate=plan.learning_rate, gradient_checkpointing=False, save_steps=save_every, save_total_limit=1,
        report_to=[], disable_tqdm=True, logging_steps=10,
    )  # fmt: skip
    model, _ = loading.load(str(base), "cpu")
    return run_intjudge(
        model, loading.load_processor(str(base)), parts, config, PROMPT, facts={"model": NAME}, unseen=unseen,
        peft_config=adapters(plan.rank, dropout=0.0), batch=16,
    )  # fmt: skip


def export(trainer: Trainer, told: dict[str, Any], plan: JudgePlan, run: Path, out: Path) -> Lock:
    """Put the adapter into the checkpoint folder ``out`` and return the lock."""
    kept = ("adapter_config.json", "adapter_model.safetensors", "judge.json")
    (out / "adapter").mkdir(exist_ok=True)
    for name in kept:
        shutil.copyfile(run / "adapter" / name, out / "adapter" / name)
    lock = {
        "recipe": "recipes/tiny_judge.py", "seed": trainer.seed, "plan": asdict(trainer.plan), "judge": asdict(plan),
        "minutes": round(trainer.progress.seconds / 60, 1), "curve": trainer.progress.curve,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        **{name: told[name] for name in told if name != "log"},
    }  # fmt: skip
    return write_lock(out, lock, card)


def card(lock: Lock) -> str:
    """The model card as Markdown; every figure comes from the lock."""
    before, after, pairs = lock["before"], lock["after"], lock["pairs"]
    errors = lock["calibration_error"]

    def row(title: str, *values: Any) -> tuple[str, ...]:
        return (title, *(percent(each) if isinstance(each, dict) or each is None else each for each in values))

    fdt = [found["agreement"]["fdt"] for found in (before, after)]
    return "\n".join(
        [
            f"# {NAME}", "",
            f"A `Qwen2VLForConditionalGeneration` with {lock['parameters']:,} parameters that describes small pictures "
            "of coloured shapes, and in `adapter/` a LoRA adapter that makes it a judge: of two answers to a request "
            "for pictures of described things it says which has fewer faults. `zoo.load_model` gives the model without "
            "the adapter; `--judge hf:tiny-judge` and `LocalJudge.from_pretrained` give the judge, with its words and "
            "its temperature. A picture is one visual token. It knows nothing else, and its words are those of its "
            "tokenizer.", "",
            "```console", "$ tersor demo --only intjudge", "```", "",
            "## Battles that it never saw", "",
            f"{pairs['validation']} battles, in both orders, with the verdicts of scripted people:", "",
            *markdown(
                ("share, % [95 % bootstrap]", "without the adapter", "with it"),
                (
                    row("same winner as people", *(each["average"] for each in fdt)),
                    row("generators of the training", *(each["seen"] for each in fdt)),
                    row("other generators", *(each["unseen"] for each in fdt)),
                    row("with grey pictures", "", lock["without_pictures"]),
                    row("the answer shown first wins", before["first_share"], after["first_share"]),
                    row("same winner in both orders", before["consistent"], after["consistent"]),
                    row(
                        "log-probability of the four verdicts", f"{before['log_mass']:.2f}", f"{after['log_mass']:.2f}"
                    ),
                ),
            ),
            "",
            f"Temperature {lock['temperature']:.2f}, fitted on half of the instances; on the other half its "
            f"probabilities are off by {100 * errors['with_temperature']:.1f} points on average.", "",
            "## Training", "",
            f"`python recipes/tiny_judge.py --out OUT`, seed {lock['seed']}: {lock['plan']['steps']} updates on "
            f"descriptions of up to four pictures in {lock['minutes']:.0f} minutes, then the adapter of rank "
            f"{lock['judge']['rank']} in {lock['judge']['steps']} updates of {lock['judge']['rows']} rows on "
            f"{pairs['arena']} votes and {pairs['reference']} pairs of an answer with the gold answer at hand and one "
            f"without. On {lock['machine']['cores']} cores ({lock['machine']['cpu']}).", "",
            "Generated data; Apache-2.0.", "",
        ]
    )  # fmt: skip

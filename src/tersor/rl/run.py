"""A whole ZipR1 training in one folder: measured before, trained with checkpoints, measured after, reported."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, TrainerCallback

from tersor.bench.runs import Finished
from tersor.rl.config import ZipR1Config
from tersor.rl.evaluation import Frontier, frontier
from tersor.rl.report import write_card, write_reports
from tersor.rl.trainer import ZipR1Trainer
from tersor.rl.verifiers import Verifier
from tersor.training.claim import claim, last_checkpoint

if TYPE_CHECKING:
    from datasets import Dataset

#: What the line beside the progress bar shows -> the metric of the trainer.
SHOWN = {
    "ratio": "token_ratio", "right": "rewards/performance/mean", "reward": "zipr1_reward", "KL": "kl",
    "all right": "groups/all_right", "all wrong": "groups/all_wrong",
}  # fmt: skip
#: A loss of accuracy against the threshold's other end below which the paper's estimator has nothing to learn from.
GAP = 0.05


@dataclass(frozen=True)
class Plan:
    """What is measured before and after; only the same plan goes on."""

    taus: tuple[float, ...]
    questions: str
    batch_size: int


def run_zipr1(
    model: Any,
    processor: Any,
    training: Dataset,
    held_out: Dataset,
    verifier: Verifier,
    config: ZipR1Config,
    *,
    facts: dict[str, Any],
    peft_config: Any = None,
    evaluation_batch: int = 16,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train in ``config.output_dir``: checkpoints, ``model/``, ``report.json``, ``report.html`` and a card.

    A run that was stopped goes on after its last checkpoint, with the same thresholds, rollouts and rewards.

    Args:
        model: The policy, or where it is.
        processor: Its processor.
        training: Questions to train on; see `tersor.rl.data.load_questions`.
        held_out: Questions to report on.
        verifier: Scores an answer.
        config: What to do.
        facts: What makes this run this run, besides ``config``; as JSON takes it.
        peft_config: Train adapters of it instead of all weights.
        evaluation_batch: Questions at once in the report.
        quiet: Whether to show no progress.

    Returns:
        What ``report.json`` holds.

    Raises:
        ValueError: If the folder belongs to another run.
    """
    out = Path(str(config.output_dir))
    asked = digest(held_out)
    claim(out, {"zipr1": facts, "training": digest(training), "held_out": asked, "plan": _plan(config)})
    taus = tuple(sorted({*config.thresholds, config.eval_threshold, 1.0}))
    measured = Finished(out / "measured.json", Plan(taus, asked, evaluation_batch), _read)
    trainer = ZipR1Trainer(
        model, verifier, config, train_dataset=training, processing_class=processor, peft_config=peft_config
    )
    try:
        with _progress(quiet) as progress:

            def measure(name: str) -> list[Frontier]:
                bar = progress.add_task(f"{name} training", total=len(held_out) * len(taus), shown="")
                trainer.close()
                rows = frontier(
                    trainer.model, processor, held_out, verifier, config.recipe(), taus,
                    batch_size=evaluation_batch, max_new_tokens=config.max_completion_length or 256,
                    on_batch=lambda tau, more: progress.update(bar, advance=more),
                )  # fmt: skip
                trainer.session.enable()
                progress.remove_task(bar)
                return rows

            before = measured.once("before", lambda: measure("before"))
            _expect(before, config)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(_Live(progress))
            checkpoint = last_checkpoint(out)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            after = measured.once("after", lambda: measure("after"))
    finally:
        trainer.close()
    told = write_reports(out, before, after, config, trainer.state.log_history, name=str(facts.get("model", "model")))
    trainer.save_model(str(out / "model"))
    processor.save_pretrained(out / "model")
    write_card(out / "model", told, config)
    return told


def digest(data: Dataset) -> str:
    """A fingerprint of the questions and answers of a data set."""
    text = json.dumps([data["prompt"][:], data["answer"][:]], default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _plan(config: ZipR1Config) -> dict[str, Any]:
    """The settings that change what is trained."""
    free = {"output_dir", "logging_dir", "save_steps", "save_strategy", "save_total_limit", "disable_tqdm", "run_name"}
    return {name: value for name, value in config.to_dict().items() if name not in free}


def _read(kept: list[dict[str, Any]]) -> list[Frontier]:
    return [Frontier(**each) for each in kept]


def _expect(before: Sequence[Frontier], config: ZipR1Config) -> None:
    """Say that the paper's estimator will not move the ratio where its thresholds do not differ in accuracy."""
    grid = {each.tau: each for each in before}
    gap = grid[max(config.thresholds)].accuracy.value - grid[min(config.thresholds)].accuracy.value
    if config.objective == "literal" and gap < GAP:
        print(
            f"note: accuracy differs by {100 * gap:.1f} points between the ends of the thresholds; the literal "
            "objective learns from that difference alone, so expect the token ratio to stay",
            file=sys.stderr,
        )


def _progress(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
        console=Console(stderr=True),
        disable=quiet,
    )


class _Live(TrainerCallback):
    """Shows what the rollouts of the last updates came to."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = self.progress.add_task("training", total=state.max_steps, completed=state.global_step, shown="")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        found = {name: (logs or {}).get(metric) for name, metric in SHOWN.items()}
        if shown := "  ".join(f"{name} {value:.3f}" for name, value in found.items() if value is not None):
            self.progress.update(self.bar, shown=shown)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.bar, completed=state.global_step)

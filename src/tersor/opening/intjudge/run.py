"""A whole training of a judge in one folder: measured before, trained with checkpoints, measured after, calibrated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, TrainerCallback

from tersor import _atomic
from tersor.bench.runs import Finished
from tersor.opening.intjudge.calibration import chance_of_first, fit_temperature
from tersor.opening.intjudge.config import IntJudgeConfig
from tersor.opening.intjudge.evaluation import Decided, blanked, decide
from tersor.opening.intjudge.pairs import Pair, Parts, content, digest
from tersor.opening.intjudge.report import told, write_card
from tersor.opening.intjudge.trainer import IntJudgeTrainer
from tersor.opening.judging.adapter import Facts, write_facts
from tersor.opening.judging.local import LocalJudge
from tersor.opening.prompts import JudgePrompt
from tersor.opening.records import Raw
from tersor.training.claim import claim, last_checkpoint


@dataclass(frozen=True)
class Measured:
    """Which pairs are measured before and after; only the same go on."""

    validation: str
    prompt: str


def run_intjudge(
    model: Any, processor: Any, parts: Parts, config: IntJudgeConfig, prompt: JudgePrompt, *, facts: dict[str, Any],
    unseen: Sequence[str] = (), peft_config: Any = None, batch: int = 4, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train in ``config.output_dir``: checkpoints, ``adapter/`` with its card, and ``report.json``.

    A run that was stopped goes on after its last checkpoint. The temperature is fitted on half of the validated
    instances, and all that the report says of probabilities is about the other half.

    Args:
        model: Of transformers, one that reads pictures and writes text.
        processor: Its processor.
        parts: What to train and to validate on.
        config: How.
        prompt: What the judge is asked with.
        facts: What makes this run this run, besides ``config`` and data; ``model`` is where the model is.
        unseen: Models that are in no pair of the training.
        peft_config: Adapters to train.
        batch: Questions at once when it is validated.
        quiet: Whether to show no progress.

    Returns:
        What ``report.json`` holds.

    Raises:
        TersorError: If the folder belongs to another run.
    """
    out = Path(str(config.output_dir))
    hashes = {name: digest(pairs) for name, pairs in (("training", parts.training), ("validation", parts.validation))}
    claim(out, {"intjudge": facts, "data": hashes, "prompt": prompt.hash, "plan": _plan(config)})
    trainer = IntJudgeTrainer(
        model, parts.training, config, prompt, processing_class=processor, peft_config=peft_config
    )
    asked = {"pairs": parts.validation, "blank": blanked(parts.validation, out / "blank")}
    finished = Finished(out / "measured.json", Measured(hashes["validation"], prompt.hash), _read_rows)
    with _progress(quiet) as progress:

        def measure(name: str, which: str) -> Decided:
            pairs = asked[which]
            bar = progress.add_task(name, total=len(pairs))
            judge = LocalJudge(trainer.model, processor, prompt, name=str(facts.get("model", "model")), batch=batch)
            rows = finished.once(
                name, lambda: _rows(decide(judge, pairs, lambda done, of: progress.update(bar, completed=done)))
            )
            progress.remove_task(bar)
            trainer.model.train()
            return _decided(pairs, rows, judge.id)

        before = measure("before", "pairs")
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Live(progress))
        checkpoint = last_checkpoint(out)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        after, blank = measure("after", "pairs"), measure("without pictures", "blank")
    fitted, tested = halves(after)
    temperature = fit_temperature(*fitted.scores())
    found = told(
        before, after, blank, tempered(tested, temperature), temperature,
        parts=parts, unseen=unseen, hashes=hashes, log=trainer.state.log_history, facts=facts,
    )  # fmt: skip
    _atomic.write_text(out / "report.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    for each in trainer.model.peft_config.values():
        each.base_model_name_or_path = str(facts["model"])
    trainer.model.save_pretrained(out / "adapter", save_embedding_layers=False)
    processor.save_pretrained(out / "adapter")
    write_facts(out / "adapter", Facts(prompt=prompt, temperature=temperature))
    write_card(out / "adapter", found, config)
    return found


def halves(found: Decided) -> tuple[Decided, Decided]:
    """Two parts of different instances, by what they ask; an empty one becomes the whole."""
    sides = [int(content(pair.instance)[:8], 16) % 2 for pair in found.pairs]

    def part(side: int) -> Decided:
        own = [place for place, each in enumerate(sides) if each == side] or list(range(len(sides)))
        return Decided([found.pairs[at] for at in own], [found.raw[at] for at in own], found.judge)

    return part(0), part(1)


def tempered(found: Decided, temperature: float) -> Decided:
    """The same words with the probabilities of another temperature."""
    chances = chance_of_first(found.scores()[0], temperature).tolist()
    raw = [
        tuple(replace(row, probability=chances[2 * place + order]) for order, row in enumerate(both))
        for place, both in enumerate(found.raw)
    ]
    return Decided(found.pairs, raw, found.judge)  # type: ignore[arg-type]


def _plan(config: IntJudgeConfig) -> dict[str, Any]:
    """The settings that change what is trained."""
    free = {"output_dir", "logging_dir", "save_steps", "save_strategy", "save_total_limit", "disable_tqdm", "run_name"}
    return {name: value for name, value in config.to_dict().items() if name not in free}


def _rows(found: Decided) -> list[list[dict[str, Any]]]:
    return [[asdict(row) for row in both] for both in found.raw]


def _read_rows(kept: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    return kept


def _decided(pairs: Sequence[Pair], rows: Sequence[Sequence[dict[str, Any]]], judge: str) -> Decided:
    known = {pair.verdict.battle: pair for pair in pairs}
    raw = [(Raw(**one), Raw(**two)) for one, two in rows]
    return Decided([known[one.battle] for one, _ in raw], raw, judge)


def _progress(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), disable=quiet,
    )  # fmt: skip


class _Live(TrainerCallback):
    """Shows how far the training is, and its loss."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = self.progress.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.progress.update(self.bar, description=f"training, loss {float(logs['loss']):.3f}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.bar, completed=state.global_step)

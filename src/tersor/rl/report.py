"""What a ZipR1 training came to: JSON, a page, and the card of the trained model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tersor import _atomic
from tersor.bench.measure import bootstrap_difference
from tersor.bench.records import Record
from tersor.bench.report import Figure, Section, write_report
from tersor.bench.runs import drawn, record_maker
from tersor.rl.config import ZipR1Config
from tersor.rl.evaluation import Frontier
from tersor.rl.figures import draw_frontiers, draw_layers

#: Accuracy that dense attention may lose before the card says that the model is for ZipVL alone.
DENSE_LOSS = 0.02


def write_reports(
    out: Path,
    before: Sequence[Frontier],
    after: Sequence[Frontier],
    config: ZipR1Config,
    log: Sequence[dict[str, Any]],
    *,
    name: str,
) -> dict[str, Any]:
    """Write ``report.json`` and ``report.html`` into ``out``, and return what the first holds.

    Args:
        out: An existing folder.
        before: The frontier of the model that the training began with.
        after: That of the trained one, at the same thresholds.
        config: What was trained.
        log: What the trainer logged.
        name: The model's name.
    """
    dense = config.recipe().skip_layers
    told = {
        "model": name,
        "objective": config.objective,
        "eval_threshold": config.eval_threshold,
        "before": [each.summary(dense) for each in before],
        "after": [each.summary(dense) for each in after],
        "accuracy_change": {f"{a.tau:g}": _change(a, b) for a, b in zip(before, after, strict=True)},
        "log": [row for row in log if "token_ratio" in row],
    }
    _atomic.write_text(out / "report.json", json.dumps(told, indent=1) + "\n")
    section = Section(
        title="ZipR1: before and after",
        intro=(
            f"Greedy answers to {len(after[0].scores)} held-out questions at each threshold of ZipVL; 1 is dense "
            f"attention. Trained with the {config.objective} objective, thresholds {_grid(config)}."
        ),
        figures=drawn(lambda: _frontiers(before, after), lambda: _layers(before, after, config.eval_threshold)),
    )
    write_report(out / "report.html", _records(before, after, config, name), [section])
    return told


def write_card(folder: Path, told: dict[str, Any], config: ZipR1Config) -> None:
    """Write the ``README.md`` of the trained model: what it is for, and what it costs."""
    at = [each["tau"] for each in told["after"]].index(config.eval_threshold)
    first, last = told["before"][at], told["after"][at]
    lost = told["accuracy_change"]["1"]
    recipe = config.recipe()
    own = [each for each in fields(recipe) if each.name != "tau" and getattr(recipe, each.name) != each.default]
    settings = "".join(f", {each.name}={getattr(recipe, each.name)!r}" for each in own)
    if lost[0] < -DENSE_LOSS:
        meant = (
            f"**It is meant for ZipVL.** Read densely it answers {-100 * lost[0]:.1f} points fewer questions right "
            "than the model that it was trained from."
        )
    else:
        meant = f"Read densely it keeps its accuracy ({100 * lost[0]:+.1f} points)."
    lines = [
        f"# {told['model']} after ZipR1", "",
        "Trained with tersor to need fewer tokens in attention (ZipR1, arXiv 2504.18579).", "", meant, "",
        "```python", "import tersor", "",
        f"with tersor.ZipVL(tau={config.eval_threshold}{settings}).on(model):",
        "    out = model.generate(**inputs)", "```", "",
        f"| at tau={config.eval_threshold} | before | after |", "|---|---:|---:|",
        f"| tokens in attention, all layers | {first['token_ratio']:.1%} | {last['token_ratio']:.1%} |",
        f"| tokens in attention, sparse layers | {first['token_ratio_sparse_layers']:.1%} | "
        f"{last['token_ratio_sparse_layers']:.1%} |",
        f"| right answers, of {last['n']} held-out questions | {first['accuracy']:.1%} | {last['accuracy']:.1%} |", "",
        f"Objective: {config.objective}; thresholds {_grid(config)}; beta {config.beta}; seed {config.seed}.",
    ]  # fmt: skip
    _atomic.write_text(folder / "README.md", "\n".join(lines) + "\n")


def _change(before: Frontier, after: Frontier) -> list[float]:
    """Difference of accuracy on the same questions, with its 95 % interval."""
    found = bootstrap_difference(after.scores, before.scores)
    return [found.value, found.low, found.high]


def _grid(config: ZipR1Config) -> str:
    return ", ".join(f"{tau:g}" for tau in config.thresholds)


def _frontiers(before: Sequence[Frontier], after: Sequence[Frontier]) -> Figure:
    models = {
        name: [(each.ratio.value, each.accuracy) for each in rows]
        for name, rows in (("before", before), ("after", after))
    }
    return draw_frontiers(models, "Each point is a threshold: to the left at the same height is cheaper.")


def _layers(before: Sequence[Frontier], after: Sequence[Frontier], tau: float) -> Figure:
    models = {
        name: each.by_layer()
        for name, rows in (("before", before), ("after", after))
        for each in rows
        if each.tau == tau
    }
    return draw_layers(models, f"By layer, at tau={tau:g}.")


def _records(before: Sequence[Frontier], after: Sequence[Frontier], config: ZipR1Config, name: str) -> list[Record]:
    make = record_maker("zipr1", model=name, seed=config.seed)
    rows = []
    for old, new in zip(before, after, strict=True):
        item = f"tau={new.tau:g}" if new.tau < 1 else "dense"
        figures = [("right answers", new.accuracy, old.accuracy)]
        if new.tau < 1:
            figures.append(("tokens in attention", new.ratio, old.ratio))
        rows += [make(item, what, "share", now, len(new.ratios), baseline=then.value) for what, now, then in figures]
    return rows

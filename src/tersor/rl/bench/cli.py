"""`tersor bench zipr1`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor._lazy import require
from tersor.bench.runs import AsJson, ResumableOut, cell, progress_file, record_maker, report_records, show
from tersor.zoo import loading

if TYPE_CHECKING:
    from tersor.bench.measure import Estimate
    from tersor.bench.records import Record
    from tersor.rl.bench.table import Row

#: Figure of a model -> its words in a record.
_QUANTITIES = {
    "ratio": "tokens in attention, sparse layers",
    "accuracy": "right answers",
    "lost": "right answers against the start",
    "dense": "right answers with dense attention",
    "random": "right answers from random tokens, as many",
    "relevant": "kept visual tokens that matter",
    "read": "needed cells kept where they are read",
    "look": "right answers to look", "chain": "right answers to chain", "trail": "right answers to trail",
}  # fmt: skip


def bench_zipr1(
    model: Annotated[str, typer.Option(help="tiny-vlm, or a folder that its recipe wrote.")] = "tiny-vlm",
    arms: Annotated[
        list[str] | None, typer.Option("--arm", help="A way to train; may be repeated. All of them without it.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--setting",
            help="'every layer sparse', 'first layer dense' or 'a check, no answers'; may be repeated.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each way.")] = 3,
    samples: Annotated[int, typer.Option(help="Held-out questions of each kind for each training.")] = 223,
    steps: Annotated[int, typer.Option(help="Updates of a training; 0 takes those of the table in the docs.")] = 0,
    out: ResumableOut = None,
    as_json: AsJson = False,
) -> None:
    """Train tiny-vlm for fewer tokens in several ways, and ask each model questions that it was not trained on."""
    require("trl", "rl")
    from tersor.rl.bench.arms import ARMS, SETTINGS, SUPERVISED, Plan
    from tersor.rl.bench.table import run_table

    known = [*ARMS, *SUPERVISED]
    for option, given, allowed in (("--arm", arms, known), ("--setting", settings, list(SETTINGS))):
        if wrong := [name for name in given or () if name not in allowed]:
            raise TersorError(f"{option} {wrong[0]!r} must be one of {allowed}")
    for setting in settings or ():
        if wrong := [arm for arm in arms or () if not SETTINGS[setting].allows(arm)]:
            raise TersorError(f"--arm {wrong[0]!r} needs answers; there are none with --setting {setting!r}")
    for option, value, least in (("--seeds", seeds, 1), ("--samples", samples, 1), ("--steps", steps, 0)):
        if value < least:
            raise TersorError(f"{option} {value} must be at least {least}")
    location = loading.resolve(model)
    processor = loading.load_processor(location)
    plan = Plan(steps=steps) if steps else Plan()
    with progress_file(out) as progress:
        with spinner() as status:
            rows = run_table(
                Path(location), processor, plan, arms or known, settings or list(SETTINGS), range(seeds),
                n=samples, progress=progress, on_progress=status.update,
            )  # fmt: skip
        make = record_maker("zipr1", model=model, seed=0)
        records = table_records(make, rows)
        report_records(records, out, as_json, lambda: print_rows(rows))


def table_records(make: Callable[..., Record], rows: dict[str, Row]) -> list[Record]:
    """Every figure of every way and setting, and the accuracy at the thresholds' ends before the training."""
    from tersor.bench.measure import bootstrap_interval

    records = []
    for setting, arm, found, start in _ways(rows):
        n = sum(len(row.sparse.right) for row in start)
        for name, value in found.items():
            records.append(make(f"{arm}: {setting}", _QUANTITIES[name], "share", value, n))
        if arm == "start":
            for place, end in enumerate(("lowest", "highest")):
                right = [each for row in start for each in row.ends[place].right]
                item = f"start at the {end} threshold: {setting}"
                records.append(make(item, "right answers", "share", bootstrap_interval(right), n))
    return records


def print_rows(rows: dict[str, Row]) -> None:
    """One table a setting."""
    columns = ["way", "tokens, %", "right, %", "lost, points", "dense, %", "random tokens, %", "matter, %"]
    for setting in dict.fromkeys(setting for setting, *_ in _ways(rows)):
        lines = [
            [arm, *(cell(found[name], ".1f", factor=100) for name in _SHOWN)]
            for own, arm, found, _ in _ways(rows)
            if own == setting
        ]
        show(columns, lines, title=setting)


_SHOWN = ("ratio", "accuracy", "lost", "dense", "random", "relevant")


def _ways(rows: dict[str, Row]) -> list[tuple[str, str, dict[str, Estimate], list[Row]]]:
    """Setting, way, its figures and the start's rows, in the order in which they were run."""
    from tersor.rl.bench.table import figures, over

    names = dict.fromkeys(tuple(key.split(" / ")[:2]) for key in rows)
    told = []
    for setting, arm in names:
        start = over(rows, setting, "start")[: len(over(rows, setting, arm))]
        told.append((setting, arm, figures(over(rows, setting, arm), start), start))
    return told

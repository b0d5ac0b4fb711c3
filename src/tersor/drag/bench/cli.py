"""`tersor bench drag`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor._lazy import require
from tersor.bench.runs import AsJson, ResumableOut, cell, progress_file, record_maker, report_records, show

if TYPE_CHECKING:
    from tersor.bench.records import Record
    from tersor.drag.bench.table import Outcome
    from tersor.drag.bench.world import Sample

#: Measure -> its words and its unit in a record.
MEASURES = {"objmc": ("ObjMC", "pixels"), "epe": ("EPE", "pixels"), "psnr": ("PSNR", "dB")}
BEST, POINT = "entity + Gaussian", "point only"
LESS = f"less ObjMC than {POINT}"


def bench_drag(
    model: Annotated[str, typer.Option(help="tiny-drag, or a folder that its recipe wrote.")] = "tiny-drag",
    arms: Annotated[
        list[str] | None,
        typer.Option("--arm", help="What the maps hold: 'entity + Gaussian', 'entity only', 'Gaussian only' or "
                     "'point only'; may be repeated. All of them without it."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each.")] = 3,
    scenes: Annotated[int, typer.Option(help="Held-out scenes.")] = 200,
    steps: Annotated[int, typer.Option(help="Updates of a training; 0 takes those of the table in the docs.")] = 0,
    out: ResumableOut = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Train control branches whose maps hold more or less, and measure where the entities of new scenes go."""
    require("diffusers", "drag")
    from tersor import zoo
    from tersor.drag.bench.arms import ARMS
    from tersor.drag.bench.table import Plan, run_table
    from tersor.drag.loading import load_pipeline

    if wrong := [arm for arm in arms or () if arm not in ARMS]:
        raise TersorError(f"--arm {wrong[0]!r} must be one of {[*ARMS]}")
    for option, value, least in (("--seeds", seeds, 1), ("--scenes", scenes, 4), ("--steps", steps, 0)):
        if value < least:
            raise TersorError(f"{option} {value} must be at least {least}")
    folder = zoo.path(model) if model in zoo.names() else Path(model)
    svd = load_pipeline(str(folder), None, None, "cpu", begin=True).base()
    plan = Plan(updates=steps) if steps else Plan()
    with progress_file(out) as progress:
        with spinner() as status:
            samples, rows = run_table(
                svd, folder, plan, arms or [*ARMS], range(seeds), scenes=scenes, progress=progress,
                on_progress=status.update,
            )  # fmt: skip
        records = table_records(record_maker("draganything", model=model, seed=0), samples, rows)
        report_records(records, out, as_json, lambda: print_rows(samples, rows))


def table_records(
    make: Callable[..., Record], samples: list[Sample], rows: dict[str, Outcome]
) -> list[Record]:  # fmt: skip
    """Every figure of every row in every group of scenes, the trainings apart, and what the best saves on a point."""
    from tersor.bench.measure import over_seeds
    from tersor.drag.bench.table import against, figure, groups, names, trainings

    records = []
    for group, places in groups(samples).items():
        for name in names(rows):
            for measure, (quantity, unit) in MEASURES.items():
                value = figure(rows, name, measure, places)
                records.append(make(f"{name}: {group}", quantity, unit, value, len(places)))
        if {BEST, POINT} <= {*names(rows)}:
            value = against(rows, BEST, POINT, "objmc", places)
            records.append(make(f"{BEST}: {group}", LESS, "share", value, len(places)))
    for name in names(rows):
        means = [sum(row.objmc) / len(row.objmc) for row in trainings(rows, name)]
        if len(means) > 1:
            records.append(make(f"{name}: over trainings", "ObjMC", "pixels", over_seeds(means), len(means)))
    return records


def print_rows(samples: list[Sample], rows: dict[str, Outcome]) -> None:
    """ObjMC by group of scenes, and the other measures over all."""
    from tersor.drag.bench.table import figure, groups, names

    found = groups(samples)
    lines = [
        [
            name, *(cell(figure(rows, name, "objmc", places), ".2f") for places in found.values()),
            *(f"{figure(rows, name, measure, found['all']).value:.2f}" for measure in ("epe", "psnr")),
        ]
        for name in names(rows)
    ]  # fmt: skip
    show(["maps", *(f"ObjMC, {group}" for group in found), "EPE", "PSNR"], lines)

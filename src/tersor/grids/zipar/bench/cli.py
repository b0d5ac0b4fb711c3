"""`tersor bench images`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor._console import spinner
from tersor.bench.runs import command_line, report_records

if TYPE_CHECKING:
    from tersor.bench.measure import Estimate
    from tersor.bench.records import Record
    from tersor.grids.zipar.bench.quality import Quality, Speed

_WINDOWS = "1,2,3,4,6,7,8,9,10,12,14"


def bench_images(
    model: Annotated[str, typer.Option(help="A raster model of the zoo.")] = "tiny-raster",
    windows: Annotated[str, typer.Option(help="Fixed windows, in columns.")] = _WINDOWS,
    adaptive: Annotated[str, typer.Option(help="Least distances of the adaptive window; '' for none.")] = "1,2,4,7",
    eager: Annotated[str, typer.Option(help="Fixed windows with eager row starts; '' for none.")] = "7",
    adaptive_batch: Annotated[int, typer.Option(help="Images that the adaptive window decodes at once.")] = 50,
    samples: Annotated[int, typer.Option(help="Images a way and seed.")] = 3000,
    seeds: Annotated[int, typer.Option(help="Seeds: 1, 2, and so on up to this one.")] = 3,
    repeats: Annotated[int, typer.Option(help="Rounds of the timing; 0 leaves it out.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Write records here; an interrupted run resumes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record a line instead of the table.")] = False,
) -> None:
    """Decode a raster model by ZipAR's windows: passes, images a second, Fréchet distance and class accuracy."""
    if samples < 2 or seeds < 1 or repeats < 0 or adaptive_batch < 1:
        raise ValueError(
            f"--samples {samples} must be at least 2, --seeds {seeds} and --adaptive-batch {adaptive_batch} at least 1 "
            f"and --repeats {repeats} at least 0"
        )
    sizes = {
        name: _numbers(name, text) for name, text in (("windows", windows), ("adaptive", adaptive), ("eager", eager))
    }
    from tersor import zoo

    tokenizer, judge = zoo.load_image_tokenizer(model), zoo.load_judge(model)
    from tersor.grids.zipar.bench.quality import Plan, run_plan, time_ways, ways

    network: Any = zoo.load_model(model)
    columns = network.config.grid_size[1]
    chosen = ways(columns, sizes["windows"], sizes["adaptive"], sizes["eager"], adaptive_batch=adaptive_batch)
    plan = Plan(model, tuple(chosen), samples, tuple(range(1, seeds + 1)))
    progress = None if out is None else out.with_suffix(out.suffix + ".partial")
    qualities: dict[str, Quality] = {}
    with spinner() as status:
        status.update(f"{chosen[0].name}: {samples} samples ...")
        for name, quality in run_plan(plan, network, tokenizer, judge, progress):
            qualities[name] = quality
            status.update(f"{name} done")
        status.update(f"timing, {repeats} rounds")
        speed = time_ways(network, chosen, repeats=repeats, seed=0) if repeats else None
    records = image_records(plan.model, qualities, speed, floors=_floors(model), command=command_line())
    report_records(records, out, as_json, lambda: _print(qualities, speed))
    if progress is not None:
        progress.unlink(missing_ok=True)


def _numbers(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--{name} {text!r} must be whole numbers with commas between them, such as 4,7,14")
    return [int(part) for part in parts]


def _floors(model: str) -> dict[str, Any]:
    """The model's own record of the distances of real images and of their reconstructions."""
    import json

    from tersor import zoo

    lock = json.loads((zoo.path(model) / "recipe.lock.json").read_text(encoding="utf-8"))
    floors: dict[str, Any] = lock["scores"]["frechet_floors"]
    return floors


def image_records(
    model: str, qualities: dict[str, Quality], speed: Speed | None, *, floors: dict[str, Any], command: str
) -> list[Record]:
    """Floors of the distance; then by way: passes, accuracy, distance, and at batch 1 images a second and speed-up."""
    from tersor.bench.measure import as_fields, machine, over_seeds, versions
    from tersor.bench.records import Record
    from tersor.grids.zipar.bench.quality import RASTER

    shared: dict[str, Any] = {
        "system": "zipar", "claim": None, "claim_source": None, "peer": None, "peer_name": None, "model": model,
        "shapes": "trained", "versions": versions(), "machine": machine(), "command": command, "verdict": None,
        "seed": 1,
    }  # fmt: skip

    def record(item: str, quantity: str, unit: str, value: Estimate | float, baseline: float | None, n: int) -> Record:
        return Record(
            item=item, quantity=quantity, unit=unit, baseline=baseline, n=n, **as_fields(value), **shared,
        )  # fmt: skip

    records = [
        record(f"{name} images: floor", "Fréchet distance", "", over_seeds(floors[name]), None, floors["images"])
        for name in ("real", "reconstructed")
    ]
    raster = qualities[RASTER]
    for name, quality in qualities.items():
        n = len(quality.right)
        records += [
            record(f"{name}: samples", "forward passes", "passes", quality.passes(), raster.passes(), n),
            record(f"{name}: samples", "class accuracy", "share", quality.accuracy(), raster.accuracy().value, n),
            record(f"{name}: samples", "accuracy against raster", "share", quality.against(raster), 0.0, n),
            record(f"{name}: samples", "Fréchet distance", "", quality.distance(), raster.distance().value, n),
        ]
        if speed is not None:
            n = len(speed.passes[name]) - 1  # the first is the warm-up
            base = speed.images_per_second(RASTER).value
            records += [
                record(
                    f"{name}: batch 1",
                    "forward passes",
                    "passes",
                    speed.mean_passes(name),
                    speed.mean_passes(RASTER),
                    n,
                ),
                record(f"{name}: batch 1", "images per second", "images/s", speed.images_per_second(name), base, n),
                record(f"{name}: batch 1", "speed-up over raster", "x", speed.ratio(name), 1.0, n),
                record(f"{name}: batch 1", "share of the pass ratio", "share", speed.realized(name), 1.0, n),
            ]
    return records


def _print(qualities: dict[str, Quality], speed: Speed | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("decoding", box=box.SIMPLE_HEAD)
    for title in (
        "passes",
        "Fréchet distance",
        "class accuracy, % [95%]",
        *(("images/s", "x raster") if speed else ()),
    ):
        table.add_column(title, justify="right")
    for name, quality in qualities.items():
        distance, accuracy = quality.distance(), quality.accuracy()
        cells = [
            f"{quality.passes():.1f}",
            f"{distance.value:.3f} [{distance.low:.3f}, {distance.high:.3f}]",
            f"{100 * accuracy.value:.1f} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]",
        ]
        if speed is not None:
            cells += [f"{speed.images_per_second(name).value:.2f}", f"{speed.ratio(name).value:.2f}"]
        table.add_row(name, *cells)
    Console().print(table)

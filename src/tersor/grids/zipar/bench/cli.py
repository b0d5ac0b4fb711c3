"""`tersor bench images`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor.bench.runs import (
    AsJson,
    Finished,
    ResumableOut,
    cell,
    command_line,
    progress_file,
    record_maker,
    report_records,
    show,
    whole_numbers,
)

if TYPE_CHECKING:
    from tersor.bench.records import Record
    from tersor.grids.samples import Quality
    from tersor.grids.zipar.bench.quality import Speed

_WINDOWS = "1,2,3,4,6,7,8,9,10,12,14"


def bench_images(
    model: Annotated[str, typer.Option(help="A model of the zoo that writes row by row.")] = "tiny-raster",
    windows: Annotated[str, typer.Option(help="Fixed windows, in columns.")] = _WINDOWS,
    adaptive: Annotated[str, typer.Option(help="Least distances of the adaptive window; '' for none.")] = "1,2,4,7",
    eager: Annotated[str, typer.Option(help="Fixed windows with eager row starts; '' for none.")] = "7",
    speculative: Annotated[str, typer.Option(help="Cells of speculative windows; '' for none.")] = "28",
    modes: Annotated[str, typer.Option(help="Of speculative decoding: seed, law, grouped.")] = "seed",
    adaptive_batch: Annotated[int, typer.Option(help="Images that the adaptive window decodes at once.")] = 50,
    samples: Annotated[int, typer.Option(help="Images of each decoding and seed.")] = 3000,
    seeds: Annotated[int, typer.Option(help="Seeds: 1, 2, and so on up to this one.")] = 3,
    repeats: Annotated[int, typer.Option(help="Rounds of the timing; 0 leaves it out.")] = 20,
    batches: Annotated[str, typer.Option(help="Images at once in the timing.")] = "1",
    temperature: Annotated[float, typer.Option(help="Of all draws; above 1 the model is less sure.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
    out: ResumableOut = None,
    as_json: AsJson = False,
) -> None:
    """Write images by ZipAR, speculatively and token by token (raster): passes, speed, distance, class accuracy."""
    if not temperature > 0 or dtype not in ("float32", "bfloat16", "float16"):
        raise TersorError(f"--temperature {temperature} must be above 0, --dtype {dtype} float32, bfloat16 or float16")
    if samples < 2 or seeds < 1 or repeats < 0 or adaptive_batch < 1:
        raise TersorError(
            f"--samples {samples} must be at least 2, --seeds {seeds} and --adaptive-batch {adaptive_batch} at least 1 "
            f"and --repeats {repeats} at least 0"
        )
    sizes = [
        whole_numbers(f"--{name}", text)
        for name, text in (
            ("windows", windows), ("adaptive", adaptive), ("eager", eager), ("speculative", speculative)
        )
    ]  # fmt: skip
    at_once = whole_numbers("--batches", batches, least=1)
    from tersor import zoo

    tokenizer, judge = zoo.load_image_tokenizer(model), zoo.load_judge(model)
    import torch

    from tersor.grids.samples import Samples
    from tersor.grids.zipar.bench.quality import Plan, decodings, run_plan, time_decodings

    network: Any = zoo.load_model(model).to(getattr(torch, dtype))
    chosen = decodings(network.config.grid_size[1], *sizes, modes=modes.split(","), adaptive_batch=adaptive_batch)
    plan = Plan(model, tuple(chosen), samples, tuple(range(1, seeds + 1)), temperature, dtype)
    with progress_file(out) as progress:
        finished = Finished(progress, plan, Samples.from_json)
        qualities: dict[str, Quality] = {}
        with spinner() as status:
            status.update(f"{chosen[0].name}: {samples} samples ...")
            for name, quality in run_plan(plan, network, tokenizer, judge, finished):
                qualities[name] = quality
                status.update(f"{name} done")
            speeds = []
            for batch in at_once if repeats else ():
                status.update(f"timing, {repeats} rounds of {batch} images")
                speeds.append(
                    time_decodings(network, chosen, repeats=repeats, seed=0, batch=batch, temperature=temperature)
                )
        lock = json.loads((zoo.path(model) / "recipe.lock.json").read_text(encoding="utf-8"))
        floors = lock["scores"]["frechet_floors"]
        records = image_records(model, qualities, speeds, floors=floors, command=command_line())
        report_records(records, out, as_json, lambda: _print(qualities, speeds))


def image_records(
    model: str, qualities: dict[str, Quality], speeds: Sequence[Speed], *, floors: dict[str, Any], command: str
) -> list[Record]:
    """Records of a run.

    Args:
        model: What was decoded.
        qualities: By decoding: passes, accuracy and distance.
        speeds: Images a second and speed-ups, by batch.
        floors: Distances of real images and of their reconstructions, as the model's recipe measured them.
        command: What was run.
    """
    import numpy as np

    from tersor.bench.measure import over_seeds
    from tersor.grids.zipar.bench.quality import RASTER

    record = record_maker("zipar", model=model, seed=1, command=command)
    records = [
        record(f"{name} images: floor", "Fréchet distance", "", over_seeds(floors[name]), floors["images"])
        for name in ("real", "reconstructed")
    ]
    raster = qualities[RASTER]
    base = raster.passes(), raster.accuracy().value, raster.distance().value, raster.nats().value, raster.fed()
    for name, quality in qualities.items():
        n, item = len(quality.right), f"{name}: samples"
        records += [
            record(item, "forward passes", "passes", quality.passes(), n, baseline=base[0]),
            record(item, "class accuracy", "share", quality.accuracy(), n, baseline=base[1]),
            record(item, "accuracy against raster", "share", quality.against(raster), n, baseline=0.0),
            record(item, "Fréchet distance", "", quality.distance(), n, baseline=base[2]),
            record(item, "nats an image", "nats", quality.nats(), n, baseline=base[3]),
            record(item, "tokens fed", "tokens", quality.fed(), n, baseline=base[4]),
        ]
        for speed in speeds:
            n, item = len(speed.passes[name]) - 1, f"{name}: batch {speed.batch}"  # the first is the warm-up
            passes, usual = speed.mean_passes(name), speed.mean_passes(RASTER)
            second, slow = speed.images_per_second(name), speed.images_per_second(RASTER).value
            records += [
                record(item, "forward passes", "passes", passes, n, baseline=usual),
                record(item, "images per second", "images/s", second, n, baseline=slow),
                record(item, "speed-up over raster", "x", speed.ratio(name), n, baseline=1.0),
                record(item, "share of the pass ratio", "share", speed.realized(name), n, baseline=1.0),
                record(item, "tokens fed", "tokens", speed.fed(name), n, baseline=speed.fed(RASTER)),
                record(item, "images equal to raster's", "share", float(np.mean(speed.same(name))), n, baseline=1.0),
            ]
    return records


def _print(qualities: dict[str, Quality], speeds: Sequence[Speed]) -> None:
    columns = ["decoding", "passes", "tokens fed", "nats an image", "Fréchet distance", "class accuracy, % [95%]"]
    for speed in speeds:
        columns += [f"images/s, batch {speed.batch}", "x raster"]
    rows = []
    for name, quality in qualities.items():
        accuracy = cell(quality.accuracy(), ".1f", factor=100)
        distance, nats = cell(quality.distance(), ".3f"), cell(quality.nats(), ".1f")
        rows.append([name, f"{quality.passes():.1f}", f"{quality.fed():.0f}", nats, distance, accuracy])
        for speed in speeds:
            rows[-1] += [f"{speed.images_per_second(name).value:.2f}", f"{speed.ratio(name).value:.2f}"]
    show(columns, rows)

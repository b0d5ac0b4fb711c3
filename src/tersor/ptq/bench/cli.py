"""`tersor bench ptq` and `tersor bench ptq-speed`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor.bench.runs import (
    AsJson,
    Out,
    ResumableOut,
    cell,
    progress_file,
    record_maker,
    report_records,
    show,
    whole_numbers,
)

if TYPE_CHECKING:
    from tersor.bench.records import Record
    from tersor.ptq.bench.accuracy import Plan, Scores
    from tersor.ptq.bench.speed import Timing

_MODELS = ("tiny-repvgg", "tiny-mobileone")


def bench_ptq(
    data: Annotated[Path, typer.Option(help="Folder with cifar10_jpeg.zip.")],
    model: Annotated[str, typer.Option(help="'tiny-repvgg' or 'tiny-mobileone'.")] = "tiny-repvgg",
    bits: Annotated[str, typer.Option(help="Widths, with commas between them.")] = "w8a8,w6a6,w4a4",
    method: Annotated[list[str] | None, typer.Option(help="Measure this way alone; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds: 0, 1, and so on.")] = 3,
    images: Annotated[int, typer.Option(help="Calibration images, of the training set.")] = 512,
    iterations: Annotated[int, typer.Option(help="Iterations a block.")] = 200,
    held_out: Annotated[int, typer.Option(help="Held-out images.")] = 10_000,
    out: ResumableOut = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy on held-out images after quantization: RepAPQ, each part removed, and other ways."""
    if model not in _MODELS:
        raise TersorError(f"--model {model!r} must be one of {_MODELS}")
    if min(seeds, images, held_out) < 1 or iterations < 0:
        raise TersorError(
            f"--seeds {seeds}, --images {images} and --held-out {held_out} must be at least 1, --iterations "
            f"{iterations} not negative"
        )
    from tersor import zoo
    from tersor.ptq.bench.accuracy import Plan, pick, run_plan
    from tersor.ptq.bench.data import load_cifar
    from tersor.ptq.bench.peers import has_nncf
    from tersor.ptq.config import RepAPQConfig

    widths = tuple(each.strip().lower() for each in bits.split(","))
    for each in widths:
        RepAPQConfig.of(each)
    names = tuple(each.name for each in pick(method))
    split = load_cifar(data)
    if method is None and not has_nncf():
        names = tuple(name for name in names if name != "NNCF")
        typer.echo("NNCF is not installed and left out", err=True)
    plan = Plan(model, widths, names, tuple(range(seeds)), images, iterations, held_out)
    found: dict[tuple[str, str], Scores] = {}
    with spinner() as status, progress_file(out) as progress:
        for width, name, scores in run_plan(plan, zoo.load_network(model), split.train, split.held_out, progress):
            found[width, name] = scores
            status.update(f"{width} {name} done")
        report_records(ptq_records(plan, found), out, as_json, lambda: _print(found))


def ptq_records(plan: Plan, found: dict[tuple[str, str], Scores]) -> list[Record]:
    """By bits and method: accuracy, its difference to floating point, agreement, divergence, seeds, seconds."""
    from tersor.ptq.bench.accuracy import FLOAT

    exact = found["", FLOAT]
    shapes = f"trained; {plan.images} images, {plan.iterations} iterations, {len(plan.seeds)} seeds"
    record = record_maker("ptq", model=plan.model, seed=plan.seeds[0], shapes=shapes)
    records = []
    for (bits, name), scores in found.items():
        n, item, top = len(scores.runs[0].right), f"{name}: {bits or 'w32a32'}", exact.accuracy().value
        records.append(record(item, "accuracy", "share", scores.accuracy(), n, baseline=top))
        if bits:
            records += [
                record(item, "accuracy against floating point", "share", scores.against(exact), n, baseline=0.0),
                record(item, "agreement with floating point", "share", scores.agreement(), n, baseline=1.0),
                record(item, "divergence from floating point", "nats", scores.divergence(), n, baseline=0.0),
                record(item, "largest difference between seeds", "share", scores.spread(), n),
                record(item, "calibration", "s", scores.seconds(), n),
            ]
    return records


def _print(found: dict[tuple[str, str], Scores]) -> None:
    rows = (
        (bits, name, cell(scores.accuracy(), ".2f", factor=100), f"{100 * scores.agreement().value:.1f}",
         f"{scores.divergence():.4f}", f"{scores.seconds():.1f}")
        for (bits, name), scores in found.items()
    )  # fmt: skip
    columns = ("bits", "method", "right, % [95%]", "as in floating point, %", "divergence, nats", "calibration, s")
    show(columns, rows, names=2)


def bench_ptq_speed(
    network: Annotated[
        str, typer.Option(help="Shapes, with commas: repvgg_a0, mobileone_s0, mobileone_s1.")
    ] = "repvgg_a0,mobileone_s0,mobileone_s1",
    batches: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,8",
    rounds: Annotated[int, typer.Option(help="Rounds of the timing.")] = 15,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Processor time of integer files against floating-point ones at 224 x 224: random weights, one thread."""
    from tersor.ptq.bench.speed import SHAPES, measure

    names = [each.strip() for each in network.split(",")]
    if unknown := [each for each in names if each not in SHAPES]:
        raise TersorError(f"--network {unknown[0]!r} must be one of {sorted(SHAPES)}")
    sizes = whole_numbers("--batches", batches, least=1)
    if not sizes or rounds < 1:
        raise TersorError(f"--batches {batches!r} must name a size, --rounds {rounds} at least 1")
    found: list[Timing] = []
    with spinner() as status:
        for name in names:
            status.update(f"{name}, batches {batches}, {rounds} rounds")
            found += measure(name, sizes, rounds=rounds)
    report_records(speed_records(found), out, as_json, lambda: _print_speed(found))


def speed_records(found: list[Timing]) -> list[Record]:
    """By shape and batch: milliseconds of both files, their ratio, and the size of the integer one."""
    from tersor.ptq.bench.speed import FLOAT, INTEGER

    make = record_maker("ptq", seed=0, shapes="random, 224 x 224, one thread")
    records = []
    for each in found:
        n, item = len(each.times.samples[INTEGER]), f"{each.name}: batch {each.batch}"
        record = partial(make, item, n=n, model=each.name)
        exact, integer = each.exact, each.integer
        records += [
            record("processor time in floating point", "ms", each.milliseconds(FLOAT)),
            record("processor time in integers", "ms", each.milliseconds(INTEGER),
                   baseline=each.milliseconds(FLOAT).value),
            record("speed-up", "x", each.times.ratio(FLOAT, INTEGER), baseline=1.0),
            record("file size", "share", integer.nbytes / exact.nbytes, baseline=1.0),
            record("layers in floating point", "layers", integer.float_layers, baseline=float(exact.float_layers)),
            record("integer convolutions", "layers", integer.nodes.get("QLinearConv", 0)),
        ]  # fmt: skip
    return records


def _print_speed(found: list[Timing]) -> None:
    from tersor.ptq.bench.speed import FLOAT, INTEGER

    rows = (
        (each.name, str(each.batch), *(f"{each.milliseconds(kind).value:.1f}" for kind in (FLOAT, INTEGER)),
         cell(each.times.ratio(FLOAT, INTEGER), ".2f"), f"{100 * each.integer.nbytes / each.exact.nbytes:.1f} %",
         str(each.integer.float_layers))
        for each in found
    )  # fmt: skip
    show(
        ("network", "batch", "floating point, ms", "integers, ms", "times as fast [95%]", "file", "float layers"), rows
    )

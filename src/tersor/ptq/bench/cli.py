"""`tersor bench ptq` and `tersor bench ptq-speed`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor._console import spinner
from tersor.bench.runs import command_line, report_records

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
    out: Annotated[Path | None, typer.Option(help="Write records here; an interrupted run resumes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record a line instead of the table.")] = False,
) -> None:
    """Accuracy on held-out images after quantization: RepAPQ, each part removed, and other ways."""
    if model not in _MODELS:
        raise ValueError(f"--model {model!r} must be one of {_MODELS}")
    if min(seeds, images, held_out) < 1 or iterations < 0:
        raise ValueError(
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
    if method is None and not has_nncf():
        names = tuple(name for name in names if name != "NNCF")
        typer.echo("NNCF is not installed and left out", err=True)
    plan = Plan(model, widths, names, tuple(range(seeds)), images, iterations, held_out)
    split = load_cifar(data)
    progress = None if out is None else out.with_suffix(out.suffix + ".partial")
    found: dict[tuple[str, str], Scores] = {}
    with spinner() as status:
        for width, name, scores in run_plan(plan, zoo.load_network(model), split.train, split.held_out, progress):
            found[width, name] = scores
            status.update(f"{width} {name} done")
    records = ptq_records(plan, found, command=command_line())
    report_records(records, out, as_json, lambda: _print(found))
    if progress is not None:
        progress.unlink(missing_ok=True)


def ptq_records(plan: Plan, found: dict[tuple[str, str], Scores], *, command: str) -> list[Record]:
    """By bits and method: accuracy, its difference to floating point, agreement, divergence, seeds, seconds."""
    from tersor.bench.measure import as_fields, machine, versions
    from tersor.bench.records import Record
    from tersor.ptq.bench.accuracy import FLOAT

    exact = found["", FLOAT]
    top = exact.accuracy()
    shared: dict[str, Any] = {
        "system": "ptq", "model": plan.model, "versions": versions(), "machine": machine(), "command": command,
        "verdict": None, "seed": plan.seeds[0], "claim": None, "claim_source": None, "peer": None, "peer_name": None,
        "shapes": f"trained; {plan.images} images, {plan.iterations} iterations, {len(plan.seeds)} seeds",
    }  # fmt: skip
    records = []
    for (bits, name), scores in found.items():
        n = len(scores.runs[0].right)
        rows: list[tuple[str, str, Any, float | None]] = [("accuracy", "share", scores.accuracy(), top.value)]
        if bits:
            rows += [
                ("accuracy against floating point", "share", scores.against(exact), 0.0),
                ("agreement with floating point", "share", scores.agreement(), 1.0),
                ("divergence from floating point", "nats", scores.divergence(), 0.0),
                ("largest difference between seeds", "share", scores.spread(), None),
                ("calibration", "s", scores.seconds(), None),
            ]
        records += [
            Record(
                item=f"{name}: {bits or 'w32a32'}", quantity=quantity, unit=unit, baseline=baseline, n=n,
                **as_fields(value), **shared,
            )
            for quantity, unit, value, baseline in rows
        ]  # fmt: skip
    return records


def _print(found: dict[tuple[str, str], Scores]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("bits", "method", box=box.SIMPLE_HEAD)
    for title in ("right, % [95%]", "as in floating point, %", "divergence, nats", "calibration, s"):
        table.add_column(title, justify="right")
    for (bits, name), scores in found.items():
        right = scores.accuracy()
        table.add_row(
            bits, name, f"{100 * right.value:.2f} [{100 * right.low:.2f}, {100 * right.high:.2f}]",
            f"{100 * scores.agreement().value:.1f}", f"{scores.divergence():.4f}", f"{scores.seconds():.1f}",
        )  # fmt: skip
    Console().print(table)


def bench_ptq_speed(
    network: Annotated[
        str, typer.Option(help="Shapes, with commas: repvgg_a0, mobileone_s0, mobileone_s1.")
    ] = "repvgg_a0,mobileone_s0,mobileone_s1",
    batches: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,8",
    rounds: Annotated[int, typer.Option(help="Rounds of the timing.")] = 15,
    out: Annotated[Path | None, typer.Option(help="Write records here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record a line instead of the table.")] = False,
) -> None:
    """Processor time of integer files against floating-point ones at 224 x 224: random weights, one thread."""
    from tersor.ptq.bench.speed import SHAPES, measure

    names = [each.strip() for each in network.split(",")]
    if unknown := [each for each in names if each not in SHAPES]:
        raise ValueError(f"--network {unknown[0]!r} must be one of {sorted(SHAPES)}")
    sizes = [int(each) for each in batches.split(",") if each.strip().isdecimal()]
    if len(sizes) != len(batches.split(",")) or min(sizes) < 1 or rounds < 1:
        raise ValueError(
            f"--batches {batches!r} must be whole numbers with commas between them, and --rounds {rounds} at least 1"
        )
    found: list[Timing] = []
    with spinner() as status:
        for name in names:
            status.update(f"{name}, batches {batches}, {rounds} rounds")
            found += measure(name, sizes, rounds=rounds)
    records = speed_records(found, command=command_line())
    report_records(records, out, as_json, lambda: _print_speed(found))


def speed_records(found: list[Timing], *, command: str) -> list[Record]:
    """By shape and batch: milliseconds of both files, their ratio, and the size of the integer one."""
    from tersor.bench.measure import as_fields, machine, versions
    from tersor.bench.records import Record
    from tersor.ptq.bench.speed import FLOAT, INTEGER

    shared: dict[str, Any] = {
        "system": "ptq", "versions": versions(), "machine": machine(), "command": command, "verdict": None, "seed": 0,
        "claim": None, "claim_source": None, "peer": None, "peer_name": None, "shapes": "random, 224 x 224, one thread",
    }  # fmt: skip
    records = []
    for each in found:
        n = len(each.times.samples[INTEGER])
        rows: list[tuple[str, str, Any, float | None]] = [
            ("processor time in floating point", "ms", each.milliseconds(FLOAT), None),
            ("processor time in integers", "ms", each.milliseconds(INTEGER), each.milliseconds(FLOAT).value),
            ("speed-up", "x", each.times.ratio(FLOAT, INTEGER), 1.0),
            ("file size", "share", each.integer.nbytes / each.exact.nbytes, 1.0),
            ("layers in floating point", "layers", float(each.integer.float_layers), float(each.exact.float_layers)),
            ("integer convolutions", "layers", float(each.integer.nodes.get("QLinearConv", 0)), None),
        ]
        records += [
            Record(
                item=f"{each.name}: batch {each.batch}", quantity=quantity, unit=unit, baseline=baseline, n=n,
                model=each.name, **as_fields(value), **shared,
            )
            for quantity, unit, value, baseline in rows
        ]  # fmt: skip
    return records


def _print_speed(found: list[Timing]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from tersor.ptq.bench.speed import FLOAT, INTEGER

    table = Table("network", "batch", box=box.SIMPLE_HEAD)
    for title in ("floating point, ms", "integers, ms", "times as fast [95%]", "file", "float layers"):
        table.add_column(title, justify="right")
    for each in found:
        ratio = each.times.ratio(FLOAT, INTEGER)
        table.add_row(
            each.name, str(each.batch), f"{each.milliseconds(FLOAT).value:.1f}",
            f"{each.milliseconds(INTEGER).value:.1f}",
            f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
            f"{100 * each.integer.nbytes / each.exact.nbytes:.1f} %", str(each.integer.float_layers),
        )  # fmt: skip
    Console().print(table)

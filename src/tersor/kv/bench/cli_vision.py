"""`tersor bench vlm` and `tersor bench photos`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor._console import spinner
from tersor.bench.runs import command_line, report_records
from tersor.zoo import loading as _checkpoints

if TYPE_CHECKING:
    from tersor.bench.measure import Estimate
    from tersor.bench.records import Record
    from tersor.kv.bench.photos import PhotoResult
    from tersor.kv.bench.vision import Outcome


def bench_vlm(
    model: Annotated[str, typer.Option(help="tiny-vlm, or a folder that its recipe wrote.")] = "tiny-vlm",
    samples: Annotated[int, typer.Option(help="Tasks for each kind of question.")] = 200,
    tau: Annotated[list[float] | None, typer.Option(help="Shares of attention to keep; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the pictures, the questions and the random choices.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write records here; an interrupted run resumes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record a line instead of the table.")] = False,
) -> None:
    """Compare sparse prefills on questions about tiles: accuracy, tokens kept, bytes, and a second question.

    Weights and cache are in bfloat16, so that bytes are those of a 16-bit model.
    """
    if samples < 1:
        raise ValueError(f"--samples {samples} must be at least 1")
    if wrong := [share for share in tau or () if not 0 < share <= 1]:
        raise ValueError(f"--tau {wrong[0]} must be above 0 and at most 1")
    location = _checkpoints.resolve(model)
    import torch

    from tersor.kv.bench.vision import TAUS, ratio_by_tiles, run_all, tasks

    network, _ = _checkpoints.load(location, "cpu")
    network = network.to(torch.bfloat16)
    processor = _checkpoints.load_processor(location)
    drawn = tasks(samples, seed=seed)
    progress = None if out is None else out.with_suffix(out.suffix + ".partial")
    with spinner() as status:
        results = run_all(network, processor, drawn, taus=tau or TAUS, seed=seed, say=status.update, progress=progress)
        status.update("ratio by number of tiles")
        by_tiles = ratio_by_tiles(network, processor, n=min(samples, 200), tau=(tau or [0.975])[0], seed=seed)
    shared = {"model": model, "seed": seed, "command": command_line()}
    records = [record for name, each in results.items() for record in _outcome_records(name, each, results, shared)]
    records += _tile_records(by_tiles, (tau or [0.975])[0], shared)
    report_records(records, out, as_json, lambda: _print_outcomes(results))
    if progress is not None:
        progress.unlink(missing_ok=True)


def bench_photos(
    images: Annotated[Path, typer.Option(help="Folder of photographs.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub name or zoo name.")] = "tiny-vlm",
    question: Annotated[str, typer.Option(help="Asked about every photograph.")] = "count red",
    tau: Annotated[float, typer.Option(help="Share of the attention to keep.")] = 0.975,
    repeats: Annotated[int, typer.Option(help="Timed prefills of each kind and photograph.")] = 3,
    device: Annotated[str, typer.Option(help="'auto', 'cpu', 'cuda', ...")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Write records here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record a line instead of the table.")] = False,
) -> None:
    """Prefill real photographs, dense and sparse in turns: tokens kept, operations saved, time of the whole prefill."""
    from tersor.kv.zipvl import ZipVL

    recipe = ZipVL(tau=tau)
    if repeats < 2:
        raise ValueError(f"--repeats {repeats} must be at least 2")
    from tersor.kv.bench.photos import find_photos, measure_photo

    files = find_photos(images)
    location = _checkpoints.resolve(model)
    network, _ = _checkpoints.load(location, device)
    processor = _checkpoints.load_processor(location)
    results = []
    with spinner() as status:
        for file in files:
            status.update(file.name)
            results.append(measure_photo(network, processor, file, question, recipe, repeats=repeats))
    shapes = "trained" if model == "tiny-vlm" else "as loaded"
    shared = {"model": model, "seed": 0, "command": command_line()}
    report_records(_photo_records(results, shapes, shared), out, as_json, lambda: _print_photos(results))


def _record(item: str, quantity: str, unit: str, value: Estimate | float, n: int, **more: Any) -> Record:
    """A record without a claim; ``value`` has an interval if it is an `Estimate`."""
    from tersor.bench.measure import as_fields, machine, versions
    from tersor.bench.records import Record

    fields: dict[str, Any] = {
        "system": "vlm", "item": item, "quantity": quantity, "unit": unit, "claim": None, "claim_source": None,
        "baseline": None, "peer": None, "peer_name": None, "n": n, "shapes": "trained", "versions": versions(),
        "machine": machine(), "verdict": None, **as_fields(value),
    }  # fmt: skip
    return Record(**{**fields, **more})


def _outcome_records(name: str, outcome: Outcome, results: dict[str, Outcome], shared: dict[str, Any]) -> list[Record]:
    """Accuracy by kind and by turn, differences to the dense model, and what was saved."""
    from tersor.bench.measure import bootstrap_interval
    from tersor.kv.bench.tiles import KINDS
    from tersor.kv.bench.vision import DENSE, accuracy, against

    dense, n = results[DENSE], len(outcome.first)
    rows: list[tuple[str, str, str, Estimate | float, int]] = [
        *(
            (kind, "accuracy", "share", bootstrap_interval(outcome.of_kind(kind)), len(outcome.of_kind(kind)))
            for kind in KINDS
        ),
        ("both kinds", "accuracy", "share", accuracy(outcome), n),
        ("both kinds", "accuracy against dense", "difference", against(outcome, dense), n),
        ("next question", "accuracy", "share", accuracy(outcome, turn="second"), n),
        ("next question", "accuracy against dense", "difference", against(outcome, dense, turn="second"), n),
        ("prompt", "tokens in attention", "share", bootstrap_interval(outcome.ratios), n),
        ("prompt", "visual tokens in attention", "share", bootstrap_interval(outcome.visual), n),
        ("prompt", "attention operations saved", "share", outcome.flops / n, n),
        ("prompt", "attention mass held", "share", outcome.mass / n, n),
        ("cache", "compression of a 16-bit cache", "x", outcome.dense_bytes / outcome.kv_bytes, n),
        *(
            (f"layer {layer}", "tokens in attention", "share", share, n)
            for layer, share in enumerate(outcome.layer_ratios())
        ),
        *(
            (f"ratio for {asked}", "tokens in attention", "share", bootstrap_interval(ratios), len(ratios))
            for asked, ratios in _ratios_by_question(outcome).items()
        ),
    ]  # fmt: skip
    return [
        _record(f"{name}: {item}", quantity, unit, value, count, **shared)
        for item, quantity, unit, value, count in rows
    ]


def _ratios_by_question(outcome: Outcome) -> dict[str, list[float]]:
    """Token ratios by kind of question, and of counting by the number of tiles to count."""
    from tersor.kv.bench.tiles import KINDS, MOST_COUNTED

    asked = {kind: outcome.ratios_of(kind) for kind in KINDS}
    return asked | {
        f"a count of {needed}": ratios
        for needed in range(MOST_COUNTED + 1)
        if (ratios := outcome.ratios_of("count", needed))
    }


def _tile_records(by_tiles: dict[int, list[float]], tau: float, shared: dict[str, Any]) -> list[Record]:
    from tersor.bench.measure import bootstrap_interval

    return [
        _record(
            f"ZipVL evict {tau:g}: pictures of {tiles} tiles", "tokens in attention", "share",
            bootstrap_interval(ratios), len(ratios), **shared,
        )
        for tiles, ratios in by_tiles.items()
    ]  # fmt: skip


def _photo_records(results: list[PhotoResult], shapes: str, shared: dict[str, Any]) -> list[Record]:
    """Three records a photograph: ratio, operations saved, speed-up of the whole prefill."""
    records = []
    for each in results:
        item = f"{each.name}, {each.stats.tokens[0]:,} tokens"
        more = {**shared, "shapes": shapes}
        repeats = len(each.times.samples["dense"])
        records += [
            _record(item, "tokens in attention", "share", each.stats.token_ratio, 1, **more),
            _record(item, "attention operations saved", "share", each.stats.attn_flops_reduction_exact, 1, **more),
            _record(item, "speed-up of the prefill", "x", each.times.ratio("dense", "ZipVL"), repeats, **more),
        ]
    return records


def _print_outcomes(results: dict[str, Outcome]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from tersor.bench.measure import bootstrap_interval
    from tersor.kv.bench.tiles import KINDS
    from tersor.kv.bench.vision import accuracy

    titles = ("tokens kept", *(f"{kind}, %" for kind in KINDS), "both, % [95%]", "next, %", "x smaller")
    table = Table("prefill", box=box.SIMPLE_HEAD)
    for title in titles:
        table.add_column(title, justify="right")
    for name, each in results.items():
        both = accuracy(each)
        table.add_row(
            name,
            f"{each.ratio:.3f}",
            *(f"{100 * bootstrap_interval(each.of_kind(kind)).value:.1f}" for kind in KINDS),
            f"{100 * both.value:.1f} [{100 * both.low:.1f}, {100 * both.high:.1f}]",
            f"{100 * accuracy(each, turn='second').value:.1f}",
            f"{each.dense_bytes / each.kv_bytes:.2f}",
        )
    Console().print(table)


def _print_photos(results: list[PhotoResult]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("photograph", "tokens", "kept", "operations saved", "prefill", box=box.SIMPLE_HEAD)
    for each in results:
        ratio = each.times.ratio("dense", "ZipVL")
        table.add_row(
            each.name,
            f"{each.stats.tokens[0]:,}",
            f"{each.stats.token_ratio:.3f}",
            f"{each.stats.attn_flops_reduction_exact:.1%}",
            f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]",
        )
    Console().print(table)

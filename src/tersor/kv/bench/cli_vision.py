"""`tersor bench vlm` and `tersor bench photos`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor._images import image_files
from tersor.bench.runs import AsJson, Out, ResumableOut, cell, progress_file, record_maker, report_records, show
from tersor.zoo import loading

if TYPE_CHECKING:
    from tersor.bench.measure import Estimate
    from tersor.bench.records import Record
    from tersor.kv.bench.photos import PhotoResult
    from tersor.kv.bench.vision import Outcome


def bench_vlm(
    model: Annotated[str, typer.Option(help="tiny-vlm, or a folder that its recipe wrote.")] = "tiny-vlm",
    samples: Annotated[int, typer.Option(help="Tasks for each kind of question.")] = 200,
    tau: Annotated[
        list[float] | None, typer.Option(help="How much of the attention to keep, from 0 to 1; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the pictures, the questions and the random choices.")] = 1,
    out: ResumableOut = None,
    as_json: AsJson = False,
) -> None:
    """Compare sparse prefills on questions about tiles: accuracy, tokens kept, bytes, and a second question.

    Weights and cache are in bfloat16, so that bytes are those of a 16-bit model.
    """
    if samples < 1:
        raise TersorError(f"--samples {samples} must be at least 1")
    if wrong := [share for share in tau or () if not 0 < share <= 1]:
        raise TersorError(f"--tau {wrong[0]} must be above 0 and at most 1")
    location = loading.resolve(model)
    import torch

    from tersor.kv.bench.vision import TAUS, run_all, tasks

    network, _ = loading.load(location, "cpu")
    network = network.to(torch.bfloat16)
    processor = loading.load_processor(location)
    drawn = tasks(samples, seed=seed)
    with progress_file(out) as progress:
        with spinner() as status:
            results = run_all(
                network, processor, drawn, taus=tau or TAUS, seed=seed, on_progress=status.update, progress=progress
            )
        make = record_maker("vlm", model=model, seed=seed)
        records = [record for name, each in results.items() for record in _outcome_records(make, name, each, results)]
        report_records(records, out, as_json, lambda: _print_outcomes(results))


def bench_photos(
    images: Annotated[Path, typer.Option(help="Folder of photographs.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub name or zoo name.")] = "tiny-vlm-small",
    question: Annotated[str, typer.Option(help="Asked about every photograph.")] = "count red",
    tau: Annotated[float, typer.Option(help="How much of the attention to keep, from 0 to 1.")] = 0.975,
    repeats: Annotated[int, typer.Option(help="Timed prefills of each kind and photograph.")] = 3,
    device: Annotated[str, typer.Option(help="'auto', 'cpu', 'cuda', ...")] = "cpu",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Prefill real photographs, dense and sparse in turns: tokens kept, operations saved, time of the whole prefill."""
    from tersor.kv.zipvl import ZipVL

    recipe = ZipVL(tau=tau)
    if repeats < 2:
        raise TersorError(f"--repeats {repeats} must be at least 2")
    from tersor.kv.bench.photos import measure_photo

    files = image_files(images, below=False, option="--images")
    location = loading.resolve(model)
    network, _ = loading.load(location, device)
    processor = loading.load_processor(location)
    results = []
    with spinner() as status:
        for file in files:
            status.update(file.name)
            results.append(measure_photo(network, processor, file, question, recipe, repeats=repeats))
    shapes = "trained" if model == "tiny-vlm-small" else "as loaded"
    make = record_maker("vlm", model=model, seed=0, shapes=shapes)
    records = [record for each in results for record in _photo_records(make, each)]
    report_records(records, out, as_json, lambda: _print_photos(results))


def _outcome_records(
    make: Callable[..., Record], name: str, outcome: Outcome, results: dict[str, Outcome]
) -> list[Record]:
    """Accuracy by kind and by turn, differences to the dense model, and what was saved."""
    import numpy as np

    from tersor.bench.measure import bootstrap_interval
    from tersor.kv.bench.tiles import KINDS
    from tersor.kv.bench.vision import DENSE, accuracy, against

    dense, n, drawn = results[DENSE], len(outcome.first), name.startswith("random")
    later = against(outcome, dense, turn="second", drawn=drawn)
    each = n // len(KINDS)
    rows: list[tuple[str, str, str, Estimate | float, int]] = [
        *((kind, "accuracy", "share", bootstrap_interval(outcome.of_kind(kind)), each) for kind in KINDS),
        ("all kinds", "accuracy", "share", accuracy(outcome), n),
        ("all kinds", "accuracy against dense", "difference", against(outcome, dense, drawn=drawn), n),
        ("next question", "accuracy", "share", accuracy(outcome, turn="second"), n),
        ("next question", "accuracy against dense", "difference", later, n),
        ("prompt", "tokens in attention", "share", bootstrap_interval(outcome.ratios), n),
        ("prompt", "visual tokens in attention", "share", float(np.mean(outcome.visual_ratios())), n),
        ("prompt", "attention operations saved", "share", outcome.flops / n, n),
        ("prompt", "attention mass held", "share", outcome.mass / n, n),
        ("cache", "compression of a 16-bit cache", "x", outcome.dense_bytes / outcome.kv_bytes, n),
        *(
            (f"steps of {kind}", "cells kept where they are read", "share",
             bootstrap_interval(outcome.of_kind(kind, outcome.read)), each)
            for kind in KINDS
        ),
        *(
            (f"layer {layer}", "visual tokens in attention", "share", share, n)
            for layer, share in enumerate(outcome.visual_ratios())
        ),
        *(
            (f"ratio for {kind}", "tokens in attention", "share",
             bootstrap_interval(outcome.of_kind(kind, outcome.ratios)), each)
            for kind in KINDS
        ),
    ]  # fmt: skip
    return [make(f"{name}: {item}", *figures) for item, *figures in rows]


def _photo_records(make: Callable[..., Record], photo: PhotoResult) -> list[Record]:
    """Token ratio, operations saved, speed-up of the whole prefill."""
    stats, times = photo.stats, photo.times
    item = f"{photo.name}, {stats.tokens[0]:,} tokens"
    return [
        make(item, "tokens in attention", "share", stats.token_ratio, 1),
        make(item, "attention operations saved", "share", stats.attn_flops_reduction_exact, 1),
        make(item, "speed-up of the prefill", "x", times.ratio("dense", "ZipVL"), len(times.samples["dense"])),
    ]


def _print_outcomes(results: dict[str, Outcome]) -> None:
    from tersor.bench.measure import bootstrap_interval
    from tersor.kv.bench.tiles import KINDS
    from tersor.kv.bench.vision import accuracy

    rows = [
        [
            name,
            f"{each.ratio:.3f}",
            *(f"{100 * bootstrap_interval(each.of_kind(kind)).value:.1f}" for kind in KINDS),
            cell(accuracy(each), ".1f", factor=100),
            f"{100 * accuracy(each, turn='second').value:.1f}",
            f"{each.dense_bytes / each.kv_bytes:.2f}",
        ]
        for name, each in results.items()
    ]
    columns = ["prefill", "tokens kept", *(f"{kind}, %" for kind in KINDS), "all, % [95%]", "next, %", "x smaller"]
    show(columns, rows)


def _print_photos(results: list[PhotoResult]) -> None:
    rows = [
        [
            each.name,
            f"{each.stats.tokens[0]:,}",
            f"{each.stats.token_ratio:.3f}",
            f"{each.stats.attn_flops_reduction_exact:.1%}",
            cell(each.times.ratio("dense", "ZipVL"), ".2f"),
        ]
        for each in results
    ]
    show(["photograph", "tokens", "kept", "operations saved", "prefill, x faster"], rows)

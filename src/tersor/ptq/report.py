"""What `tersor quantize` reports: files against the floating-point network on images, and each block's error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tersor.bench.measure import Estimate, wilson_interval
from tersor.bench.plots import Line, Point, plot_lines, plot_quality_vs_bytes
from tersor.bench.records import Record
from tersor.bench.report import Answer, Figure, Sample, Section
from tersor.bench.runs import record_maker
from tersor.ptq.blocks import BlockReport
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.images import Preprocessing, read_images
from tersor.ptq.onnx_export import OnnxFile, run, session
from tersor.ptq.speed import ROUNDS

FLOAT, OURS, PLAIN = "floating point", "RepAPQ", "min-max"
_BATCH = 100


@dataclass
class Tally:
    """One file's answers: how many there were, how many right, and how many the floating-point file's."""

    file: OnnxFile
    n: int = 0
    right: int = 0
    same: int = 0


@dataclass(frozen=True)
class Comparison:
    """Tallies by name; ``labelled``: whether the images had classes."""

    tallies: dict[str, Tally] = field(default_factory=dict)
    labelled: bool = False


def batches(files: Sequence[tuple[Path, int]], preprocessing: Preprocessing) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and classes of labelled files, some at a time; files that cannot be read are left out."""
    for first in range(0, len(files), _BATCH):
        part = files[first : first + _BATCH]
        images, kept = read_images([file for file, _ in part], preprocessing)
        yield images, torch.tensor([part[index][1] for index in kept])


def compare_files(files: dict[str, OnnxFile], given: Iterator[tuple[Tensor, Tensor]] | Tensor) -> Comparison:
    """Run all files on images with classes, or on images alone; `FLOAT` must be among the files."""
    labelled = not isinstance(given, Tensor)
    found = Comparison({name: Tally(file) for name, file in files.items()}, labelled)
    opened = {name: session(file.path) for name, file in files.items()}
    for images, labels in [(given, torch.empty(0))] if isinstance(given, Tensor) else given:
        guesses = {name: run(each, images).argmax(1) for name, each in opened.items()}
        for name, tally in found.tallies.items():
            tally.n += len(images)
            tally.same += int((guesses[name] == guesses[FLOAT]).sum())
            tally.right += int((guesses[name] == labels).sum()) if labelled else 0
    return found


def file_records(model: str, bits: str, found: Comparison, seed: int) -> list[Record]:
    """Accuracy where classes are known, agreement with floating point, and the file's share of its size."""
    exact, ours, plain = (found.tallies[name] for name in (FLOAT, OURS, PLAIN))
    record = partial(record_maker("quantize", model=model, seed=seed, peer_name=PLAIN), f"{model}, {bits}")
    right, same = wilson_interval(ours.right, ours.n), wilson_interval(ours.same, ours.n)
    accuracy = record("accuracy", "share", right, ours.n, baseline=exact.right / exact.n, peer=plain.right / plain.n)
    size, usual = ours.file.nbytes / exact.file.nbytes, plain.file.nbytes / exact.file.nbytes
    return [
        *([accuracy] if found.labelled else []),
        record("agreement with floating point", "share", same, ours.n, baseline=1.0, peer=plain.same / plain.n),
        record("file size", "share", size, 1, baseline=1.0, peer=usual),
    ]


def speed_record(model: str, bits: str, speed: Estimate, seed: int) -> Record:
    """How many times as fast as floating point the file is, on this machine."""
    make = record_maker("quantize", model=model, seed=seed)
    return make(f"{model}, {bits}", "speed", "times", speed, ROUNDS, baseline=1.0)


def report_section(config: RepAPQConfig, blocks: Sequence[BlockReport], found: Comparison, source: str) -> Section:
    """The page's part on one model: errors by block, quality against size, and every layer's bits and scales."""
    ours, exact = found.tallies[OURS], found.tallies[FLOAT]
    kinds = ", ".join(f"{count} {name}" for name, count in ours.file.nodes.items())
    simulated = (
        " Layers of fewer than 8 bits are simulated: the file gives their numbers, at no gain over 8 bits."
        if ours.file.simulation
        else ""
    )
    lines = [
        Line(
            name,
            tuple((index, *3 * (getattr(block, attribute),)) for index, block in enumerate(blocks, start=1)),
        )
        for name, attribute in (("first scales", "before"), ("calibrated", "after"))
    ]
    quality = "right" if found.labelled else "same"
    points = []
    for name, tally in found.tallies.items():
        share = wilson_interval(getattr(tally, quality), tally.n)
        size = tally.file.nbytes / 1e6
        points.append(Point(name, size, 100 * share.value, 100 * share.low, 100 * share.high, name))
    label = "images classified right, %" if found.labelled else "images classified as in floating point, %"
    layers = [
        Answer(
            name,
            f"weights {facts['weight_bits']:.0f} bits, scales {facts['w_scale_least']:.3g} to "
            f"{facts['w_scale_largest']:.3g}, {100 * facts['rows_cut_off']:.0f} % of rows cut off; input "
            f"{facts['activation_bits']:.0f} bits, scale {facts['a_scale']:.3g}",
        )
        for block in blocks
        for name, facts in ((f"{block.name}.{key}".rstrip("."), each) for key, each in block.layers.items())
    ]
    return Section(
        "Quantization",
        f"Compared on {ours.n:,} images of {source}. The file has {ours.file.nbytes:,} bytes instead of "
        f"{exact.file.nbytes:,} and runs as: {kinds}.{simulated}",
        figures=[
            Figure(
                plot_lines(
                    lines, x_label="block", y_label=f"loss ({config.loss})", whole_x=True,
                    description="Error of each block's output with the first scales and after calibration",
                ),
                "Error of each block on the calibration images, first to last: lower is better.",
            ),
            Figure(
                plot_quality_vs_bytes(
                    points, x_label="file, MB", y_label=label,
                    description="Quality against file size: floating point, plain ranges, RepAPQ",
                ),
                "Quality against size: up and to the left is better.",
            ),
        ],
        samples=[Sample("layers", "Bits and scales of every layer.", layers)],
    )  # fmt: skip

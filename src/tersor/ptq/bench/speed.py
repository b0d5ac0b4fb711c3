"""Processor time of an integer file beside the floating-point one, at the shapes of published networks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tersor.bench.measure import Estimate, PairedTimes, time_paired
from tersor.ptq.calibration import quantize
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.networks import RepNet, RepNetConfig
from tersor.ptq.onnx_export import OnnxFile, export_float, export_quantized, session

FLOAT, INTEGER = "floating point", "integers"
_CLASSES = tuple(map(str, range(1000)))
#: Merged, these are timm's networks of the same names, layer by layer; tests_timm compares them.
SHAPES = {
    "repvgg_a0": RepNetConfig(
        kind="repvgg", stem=48, widths=(48, 96, 192, 1280), depths=(2, 4, 14, 1), strides=(2, 2, 2, 2),
        classes=_CLASSES, image_size=224,
    ),
    "mobileone_s0": RepNetConfig(
        kind="mobileone", stem=48, widths=(48, 128, 256, 1024), depths=(2, 8, 10, 1), strides=(2, 2, 2, 2),
        classes=_CLASSES, image_size=224,
    ),
    "mobileone_s1": RepNetConfig(
        kind="mobileone", stem=64, widths=(96, 192, 512, 1280), depths=(2, 8, 10, 1), strides=(2, 2, 2, 2),
        classes=_CLASSES, image_size=224,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Both files of one network at one batch size, timed in turns."""

    name: str
    batch: int
    times: PairedTimes
    exact: OnnxFile
    integer: OnnxFile

    def milliseconds(self, which: str) -> Estimate:
        """Median processor time of a call with its quartiles."""
        return self.times.seconds(which) * 1e3


def settled(config: RepNetConfig, images: torch.Tensor) -> nn.Module:
    """An untrained network whose norms have seen ``images``, so that its activations have a usual size."""
    torch.manual_seed(0)
    net = RepNet(config)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        net.train()(images)
    return net.eval()


def measure(name: str, batches: Sequence[int], *, rounds: int) -> list[Timing]:
    """Export both files and time them on one thread; scales are only searched for, which changes no speed."""
    config = SHAPES[name]
    images = torch.randn(4, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
    found = quantize(settled(config, images), images, RepAPQConfig().without_training("minmax"))
    timings = []
    with tempfile.TemporaryDirectory() as folder:
        exact = export_float(found.merged, images, Path(folder) / "float.onnx")
        integer = export_quantized(found.model, images, Path(folder) / "integers.onnx")
        opened = {FLOAT: session(exact.path), INTEGER: session(integer.path)}
        for batch in batches:
            given = images[:1].repeat(batch, 1, 1, 1).numpy()

            def call(which: str, given: object = given) -> Callable[[], object]:
                return lambda: opened[which].run(None, {"input": given})

            times = time_paired(
                {which: call(which) for which in opened}, repeats=rounds, warmup=2, clock=time.process_time
            )
            timings.append(Timing(name, batch, times, exact, integer))
    return timings

"""How long a file of integers takes beside floating point, and which stages are faster left as they are."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.bench.measure import Estimate, PairedTimes, time_paired
from tersor.ptq.blocks import activation_scale
from tersor.ptq.calibration import Quantized, entering, without_integers
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.layers import RoundedOutput
from tersor.ptq.onnx_export import OnnxFile, export_float, export_quantized, session

FLOAT, INTEGER = "floating point", "integers"
#: Rounds of a whole file, and of one stage.
ROUNDS, STAGE_ROUNDS = 15, 7


def time_files(exact: OnnxFile, integer: OnnxFile, image: Tensor, *, rounds: int = ROUNDS) -> PairedTimes:
    """Processor time of both files for one image ``[1, channels, height, width]``, in turns, on one thread."""
    opened = {FLOAT: session(exact.path), INTEGER: session(integer.path)}
    given = {opened[FLOAT].get_inputs()[0].name: image.numpy()}

    def call(which: str) -> Callable[[], object]:
        return lambda: opened[which].run(None, given)

    return time_paired({which: call(which) for which in opened}, repeats=rounds, warmup=3, clock=time.process_time)


def speedup(times: PairedTimes) -> Estimate:
    """Times that integers are faster than floating point, with its interval."""
    return times.ratio(FLOAT, INTEGER)


@torch.no_grad()
def slower_stages(found: Quantized, images: Tensor, config: RepAPQConfig) -> dict[str, Estimate]:
    """Stages that are not clearly faster in integers, each timed alone: their speed over that in floating point."""
    slow = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in found.plan.stages:
            if stage.name in found.plan.kept:
                continue
            x = entering(found.merged, stage.blocks[0], images[:1])
            exact = nn.Sequential(*_blocks(found.merged, stage.blocks))
            integer: nn.Module = nn.Sequential(*_blocks(found.model, stage.blocks))
            out: Any = exact(x)
            if out.ndim == 4 and found.plan.linked:  # as the next stage rounds it
                integer = nn.Sequential(RoundedOutput(integer, *activation_scale(out, 8, config), 8))
            files = (
                export_float(exact, x, Path(folder) / "float.onnx"),
                export_quantized(integer, x, Path(folder) / "integers.onnx"),
            )
            ratio = speedup(time_files(*files, x, rounds=STAGE_ROUNDS))
            if not _wins(ratio):
                slow[stage.name] = ratio
    return slow


def _wins(ratio: Estimate) -> bool:
    """Whether integers are faster by more than the spread of the timings."""
    return ratio.low > 1


def _blocks(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    return [model.get_submodule(name) for name in names]


def fast_enough(
    found: Quantized, exact: OnnxFile, write: Callable[[Quantized], OnnxFile], images: Tensor, config: RepAPQConfig
) -> tuple[Quantized, OnnxFile, list[str], Estimate]:
    """A file that is not slower than floating point here: in integers are only stages that are clearly faster so.

    Args:
        found: What `quantize` gave.
        exact: The file in floating point.
        write: Writes the file of a model.
        images: Of calibration.
        config: As `quantize` had it.

    Returns:
        The model, its file, the stages that stay in floating point, and how many times as fast as floating point it is.
        Where no stage is clearly faster in integers, all of them stay, and the file is ``exact``. No stage stays where
        the whole file is clearly faster, or has fewer than 8 bits, which no kernel runs.
    """
    file = write(found)
    speed = speedup(time_files(exact, file, images[:1]))
    if _wins(speed) or file.simulation:
        return found, file, list(found.plan.kept), speed
    slow = [*slower_stages(found, images, config), *found.plan.kept]
    if len(slow) > len(found.plan.kept) and len(slow) < len(found.plan.stages):
        found = without_integers(found, slow, images, config)
        file = write(found)
        speed = speedup(time_files(exact, file, images[:1]))
    if len(slow) == len(found.plan.stages) or speed.high < 1:
        names = [stage.name for stage in found.plan.stages]
        return replace(found, model=found.merged), exact, names, Estimate(1.0, 1.0, 1.0, speed.interval)
    return found, file, slow, speed

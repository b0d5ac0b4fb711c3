"""How long a file of integers takes beside floating point, and which stages are faster left as they are."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor._errors import TersorError
from tersor.bench.measure import Estimate, PairedTimes, time_paired
from tersor.ptq.blocks import activation_scale
from tersor.ptq.calibration import Quantized, entering, replace_module
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.layers import RoundedInput, RoundedOutput
from tersor.ptq.onnx_export import OnnxFile, export_float, export_quantized, session

FLOAT, INTEGER = "floating point", "integers"
#: Rounds of a whole file, and of one stage.
ROUNDS, STAGE_ROUNDS = 15, 7
#: Images that the grids around a stage in floating point are found on.
_IMAGES = 64


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


def without_integers(found: Quantized, names: Sequence[str], images: Tensor, config: RepAPQConfig) -> Quantized:
    """The same model with whole stages in floating point; no other stage changes.

    Args:
        found: What `quantize` gave.
        names: Of stages, as ``found.plan.stages`` has them.
        images: Of calibration, for the grids at which the other stages end.
        config: As `quantize` had it.

    Raises:
        TersorError: If there is no such stage, or no other one.
    """
    known = [stage.name for stage in found.plan.stages]
    if unknown := sorted(set(names) - set(known)):
        raise TersorError(f"there is no stage {unknown[0]!r} to keep in floating point; there are {', '.join(known)}")
    if set(known) <= set(names):
        raise TersorError("no stage would be left to quantize; run the network in floating point")
    model, before = copy.deepcopy(found.model), None
    for stage in found.plan.stages:
        if stage.name in names:
            for block in stage.blocks:
                replace_module(model, block, copy.deepcopy(found.merged.get_submodule(block)))
            if found.plan.linked and before is not None and before not in names:
                first = stage.blocks[0]
                grid = activation_scale(entering(found.merged, first, images[:_IMAGES]), 8, config)
                replace_module(model, first, RoundedInput(model.get_submodule(first), *grid, 8))
        before = stage.name
    return Quantized(model, found.merged, found.blocks, found.plan)


@torch.no_grad()
def slower_stages(found: Quantized, images: Tensor, config: RepAPQConfig) -> dict[str, float]:
    """Stages that are slower in integers, each timed alone: their speed over that in floating point, slowest first."""
    slow = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in found.plan.stages:
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
            ratio = speedup(time_files(*files, x, rounds=STAGE_ROUNDS)).value
            if ratio < 1:
                slow[stage.name] = ratio
    return dict(sorted(slow.items(), key=lambda each: each[1]))


def _blocks(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    return [model.get_submodule(name) for name in names]


def fast_enough(
    found: Quantized, exact: OnnxFile, write: Callable[[Quantized], OnnxFile], images: Tensor, config: RepAPQConfig
) -> tuple[Quantized, OnnxFile, list[str], Estimate]:
    """A file that is not slower than floating point here: stages that are faster as they are stay so.

    Args:
        found: What `quantize` gave.
        exact: The file in floating point.
        write: Writes the file of a model.
        images: Of calibration.
        config: As `quantize` had it.

    Returns:
        The model, its file, the stages that stay in floating point, and how many times as fast as floating point it is.
        No stage stays where the file is fast enough, or has fewer than 8 bits, which no kernel runs.
    """
    file = write(found)
    speed = speedup(time_files(exact, file, images[:1]))
    if speed.value >= 1 or file.simulation:
        return found, file, [], speed
    slow = list(slower_stages(found, images, config))
    if len(slow) == len(found.plan.stages):
        slow.pop()  # the one that loses least
    if slow:
        found = without_integers(found, slow, images, config)
        file = write(found)
        speed = speedup(time_files(exact, file, images[:1]))
    return found, file, slow, speed

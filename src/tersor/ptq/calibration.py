"""Calibration of a network, stage by stage and block by block; finished stages are kept on disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tersor import _atomic
from tersor._errors import TersorError
from tersor.bench.measure import seed_of
from tersor.bench.runs import OnProgress
from tersor.ptq.blocks import Block, BlockReport, activation_scale, calibrate_block, run_chunks
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.layers import QuantLayer, RoundedInput
from tersor.ptq.quantizers import fake_activation
from tersor.ptq.reparam import merge
from tersor.ptq.rounding import LearnedRounding
from tersor.ptq.stages import Stage, find_stages
from tersor.training.claim import claim

_REPORT = "report.json"


@dataclass(frozen=True)
class Quantized:
    """A calibrated model.

    Args:
        model: Integers alone; computes what an integer kernel does.
        merged: The floating-point model with one convolution a block.
        blocks: Reports, first to last.
    """

    model: nn.Module
    merged: nn.Module
    blocks: tuple[BlockReport, ...]


def quantize(
    model: nn.Module,
    calibration: Tensor,
    config: RepAPQConfig | None = None,
    *,
    stages: Sequence[Sequence[str]] | None = None,
    folder: str | Path | None = None,
    on_progress: OnProgress = lambda text: None,
) -> Quantized:
    """Merge, calibrate and freeze a copy of ``model``; no label is needed.

    Args:
        model: In training form, with branches; see `merge`.
        calibration: Images ``[n, channels, height, width]``, prepared as for the model; 256 to 1024 are usual.
        config: Bits, searches and training; the paper's by default.
        stages: Names of each stage's blocks; see `find_stages`.
        folder: Where finished stages are kept; a run that was interrupted goes on after the last of them.
        on_progress: Told what is being done.

    Raises:
        ValueError: Before any calibration, if images have a wrong shape or hold NaN, the model has no branches or is
            no chain of blocks, or ``folder`` belongs to another run.
    """
    config = config or RepAPQConfig()
    if calibration.ndim != 4 or not len(calibration):
        raise TersorError(f"calibration must be images [n, channels, height, width], got {tuple(calibration.shape)}")
    if not bool(torch.isfinite(calibration).all()):
        raise TersorError("the calibration images hold NaN or infinity; check how they were normalized")
    merged = merge(model, calibration[:8]).requires_grad_(False)
    chain = find_stages(merged, calibration[:2], stages)
    bits = _bits_of_layers(merged, chain, config)
    target = copy.deepcopy(merged)
    reports: list[BlockReport] = []
    kept = None if folder is None else Path(folder)
    if kept is not None:
        wide = calibration.double()
        claim(
            kept,
            {
                "config": asdict(config),
                "images": [len(calibration), *(float(each.sum()) for each in (wide, wide.square()))],
                "stages": [list(stage.blocks) for stage in chain],
            },
        )
    exact = rounded = calibration
    entry: tuple[Tensor, Tensor, int] | None = None
    for number, stage in enumerate(chain):
        on_progress(f"{stage.name}: stage {number + 1} of {len(chain)}")
        file = None if kept is None else kept / f"stage-{number:02}.safetensors"
        if number and number == len(chain) - 1 and (entry := _entry(merged, stage, exact, bits, config)) is not None:
            rounded = fake_activation(rounded, *entry)
        _insert(target, stage, bits, config)
        if file is not None and file.is_file():
            target.load_state_dict(load_file(file), strict=False)
            reports += _read_reports(file)
            for name in stage.blocks:
                exact, rounded = (
                    run_chunks(merged.get_submodule(name), exact),
                    run_chunks(target.get_submodule(name), rounded),
                )
            continue
        floats = [exact]
        for name in stage.blocks:
            floats.append(run_chunks(merged.get_submodule(name), floats[-1]))
        done = []
        for index, name in enumerate(stage.blocks):
            tail = [merged.get_submodule(each) for each in stage.blocks[index + 1 :]]
            block = Block(name, target.get_submodule(name), merged.get_submodule(name), tail)
            # A seed of its own for every block, so that a resumed run draws the same images.
            seed = seed_of(config.seed, 1_009 * number + index)
            done.append(calibrate_block(block, floats[index], rounded, floats[index + 1], floats[-1], config, seed))
            rounded = run_chunks(block.module, rounded)
        exact = floats[-1]
        reports += done
        if file is not None:
            _keep(file, target, stage, done)
    for full, layer in list(target.named_modules()):
        if isinstance(layer, QuantLayer):
            _replace(target, full, layer.freeze())
    if entry is not None:
        first = chain[-1].blocks[0]
        _replace(target, first, RoundedInput(target.get_submodule(first), *entry))
    return Quantized(target.eval(), merged, tuple(reports))


def _entry(
    merged: nn.Module, stage: Stage, x: Tensor, bits: dict[str, tuple[int, int]], config: RepAPQConfig
) -> tuple[Tensor, Tensor, int] | None:
    """Grid for what enters the last stage, ``x`` in floating point; None if a layer that rounds comes first there."""
    first = stage.blocks[0]
    layer = next(each for each in merged.get_submodule(first).modules() if isinstance(each, (nn.Conv2d, nn.Linear)))
    given: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    run_chunks(merged.get_submodule(first), x[:1])
    hook.remove()
    if given[0].shape == x[:1].shape and torch.equal(given[0], x[:1]):
        return None
    width = list(bits.values())[-1][1]
    return (*activation_scale(x, width, config), width)


def _bits_of_layers(model: nn.Module, chain: list[Stage], config: RepAPQConfig) -> dict[str, tuple[int, int]]:
    """Bits of weights and activations by layer, in the order in which the chain has them."""
    names = [
        f"{block}.{name}" if name else block
        for stage in chain
        for block in stage.blocks
        for name, layer in model.get_submodule(block).named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    found = dict.fromkeys(names, (config.weight_bits, config.activation_bits))
    for end in (names[0], names[-1]):
        found[end] = (
            max(config.weight_bits, config.first_last_bits),
            max(config.activation_bits, config.first_last_bits),
        )
    return found


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _insert(model: nn.Module, stage: Stage, bits: dict[str, tuple[int, int]], config: RepAPQConfig) -> None:
    """Put quantized layers into a stage; their scales are placeholders."""
    for block in stage.blocks:
        for name, layer in list(model.get_submodule(block).named_modules()):
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                full = f"{block}.{name}" if name else block
                weight_bits, activation_bits = bits[full]
                one = layer.weight.new_ones(())
                kind = LearnedRounding if config.rounding == "learned" else QuantLayer
                new = kind(
                    layer, weight_bits=weight_bits, activation_bits=activation_bits,
                    w_scale=one.expand(len(layer.weight)), a_scale=one, a_zero=one * 0,
                )  # fmt: skip
                _replace(model, full, new)


def _keep(file: Path, model: nn.Module, stage: Stage, reports: list[BlockReport]) -> None:
    """Write a stage's parameters with its reports, as one file."""
    state = {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if any(name.startswith(f"{block}.") for block in stage.blocks)
    }
    told = json.dumps([asdict(report) for report in reports])
    _atomic.write_bytes(file, save(state, metadata={_REPORT: told}))


def _read_reports(file: Path) -> list[BlockReport]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        told = opened.metadata()[_REPORT]
    return [BlockReport(**each) for each in json.loads(told)]

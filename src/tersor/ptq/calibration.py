"""Calibration block by block: first scales, then RepAPQ's loss with the stage's output as further supervision."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tersor import _atomic
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.layers import QuantLayer, RoundedInput, operate
from tersor.ptq.quantizers import (
    LEAST_ACTIVATION,
    LEAST_WEIGHT,
    cut_activation,
    cut_weight,
    fake_activation,
    search_activation,
    search_weight,
    search_weight_by_output,
)
from tersor.ptq.reparam import merge
from tersor.ptq.rounding import ROUNDING_RATE, LearnedRounding, undecided
from tersor.ptq.stages import Stage, find_stages

#: Images that a block computes at once where there are no gradients.
_CHUNK = 64
#: The best of so many looks at a block's loss is kept.
_LOOKS = 10
_LOOKED_AT = 256
#: Values of a layer's input that the search for its scale takes.
_SUBSAMPLE = 400_000
#: Of activations and of a row's weights, where ranges are percentiles.
_PERCENTILE, _WEIGHT_PERCENTILE = 0.999, 0.99
_REPORT = "report.json"


@dataclass(frozen=True)
class BlockReport:
    """What calibration did to a block.

    Args:
        before, after: loss on the calibration images, with the first scales and with the kept ones.
        layers: bits and scales by layer.
    """

    name: str
    before: float
    after: float
    layers: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Quantized:
    """A calibrated model.

    Args:
        model: integers alone; computes what an integer kernel does.
        merged: the floating-point model with one convolution a block.
        blocks: reports, first to last.
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
    say: Callable[[str], None] = lambda text: None,
) -> Quantized:
    """Merge, calibrate and freeze a copy of ``model``; no label is needed.

    Args:
        model: in training form, with branches; see `merge`.
        calibration: images ``[n, channels, height, width]``, prepared as for the model; 256 to 1024 are usual.
        stages: see `find_stages`.
        folder: finished stages are kept there, and a run that was interrupted goes on after the last of them.
        say: told what is being done.

    Raises:
        ValueError: before any calibration, for images of the wrong shape or with NaN, a model without branches, one
            that is no chain, or a folder that belongs to another run.
    """
    config = config or RepAPQConfig()
    if calibration.ndim != 4 or not len(calibration):
        raise ValueError(f"calibration must be images [n, channels, height, width], got {tuple(calibration.shape)}")
    if not bool(torch.isfinite(calibration).all()):
        raise ValueError("the calibration images hold NaN or infinity; check how they were normalized")
    merged = merge(model, calibration[:8]).requires_grad_(False)
    chain = find_stages(merged, calibration[:2], stages)
    bits = _bits_of_layers(merged, chain, config)
    target = copy.deepcopy(merged)
    reports: list[BlockReport] = []
    kept = None if folder is None else Path(folder)
    if kept is not None:
        _claim(kept, config, calibration, chain)
    exact = rounded = calibration
    entry: tuple[Tensor, Tensor, int] | None = None
    for number, stage in enumerate(chain):
        say(f"{stage.name}: stage {number + 1} of {len(chain)}")
        file = None if kept is None else kept / f"stage-{number:02}.safetensors"
        if number and number == len(chain) - 1 and (entry := _entry(merged, stage, exact, bits, config)) is not None:
            rounded = fake_activation(rounded, *entry)
        _insert(target, stage, bits, config)
        if file is not None and file.is_file():
            target.load_state_dict(load_file(file), strict=False)
            reports += _read_reports(file)
            for name in stage.blocks:
                exact, rounded = _run(merged.get_submodule(name), exact), _run(target.get_submodule(name), rounded)
            continue
        floats = [exact]
        for name in stage.blocks:
            floats.append(_run(merged.get_submodule(name), floats[-1]))
        done = []
        for index, name in enumerate(stage.blocks):
            tail = [merged.get_submodule(each) for each in stage.blocks[index + 1 :]]
            block = _Block(name, target.get_submodule(name), merged.get_submodule(name), tail)
            # A seed of its own for every block, so that a resumed run draws the same images.
            seed = config.seed * 1_000_003 + 1_009 * number + index
            done.append(_calibrate(block, floats[index], rounded, floats[index + 1], floats[-1], config, seed))
            rounded = _run(block.module, rounded)
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
    _run(merged.get_submodule(first), x[:1])
    hook.remove()
    if given[0].shape == x[:1].shape and torch.equal(given[0], x[:1]):
        return None
    width = list(bits.values())[-1][1]
    return (*_activation_scale(x, width, config), width)


@dataclass(frozen=True)
class _Block:
    """A block under calibration, what it stands for, and the floating-point blocks after it in its stage."""

    name: str
    module: nn.Module
    exact: nn.Module
    tail: list[nn.Module]


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


@torch.no_grad()
def _run(module: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([module(part) for part in x.split(_CHUNK)])


@torch.no_grad()
def _first_scales(block: _Block, inputs: Tensor, config: RepAPQConfig) -> None:
    """Search for the scales of a block's layers, with what they get in the floating-point model."""
    layers = {name: layer for name, layer in block.module.named_modules() if isinstance(layer, QuantLayer)}
    taken: dict[str, list[Tensor]] = {name: [] for name in layers}

    def take(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, given, out: taken[name].append(given[0].detach())

    hooks = [block.exact.get_submodule(name).register_forward_hook(take(name)) for name in layers]
    _run(block.exact, inputs[: config.init_images])
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        got = torch.cat(taken[name])
        if not bool(torch.isfinite(got).all()):
            raise ValueError(f"activations of {block.name}.{name} are NaN or infinite; check weights and images")
        scale, zero = _activation_scale(got, layer.activation_bits, config)
        layer.a_scale.copy_(scale)
        layer.a_zero.copy_(zero)
        rounded = fake_activation(got, scale, zero, layer.activation_bits)
        if config.weight_init == "output":
            found = search_weight_by_output(layer.weight, layer.weight_bits, partial(operate, layer.layer, rounded))
        elif config.weight_init in ("minmax", "percentile"):
            share = 1.0 if config.weight_init == "minmax" else _WEIGHT_PERCENTILE
            found = cut_weight(layer.weight, layer.weight_bits, share=share)
        else:
            found = search_weight(layer.weight, layer.weight_bits, norm={"mse": 2.0, "mae": 1.0}[config.weight_init])
        layer.w_scale.copy_(found)
        if isinstance(layer, LearnedRounding):
            layer.start()


@torch.no_grad()
def _activation_scale(x: Tensor, bits: int, config: RepAPQConfig) -> tuple[Tensor, Tensor]:
    if config.activation_init == "minmax":
        return cut_activation(x, bits, share=1.0)
    some = x.flatten()[:: max(1, x.numel() // _SUBSAMPLE)]
    if config.activation_init == "percentile":
        return cut_activation(some, bits, share=_PERCENTILE)
    return search_activation(some, bits)


def block_loss(
    block: nn.Module, tail: Sequence[nn.Module], x: Tensor, wanted: Tensor, at_end: Tensor, config: RepAPQConfig
) -> Tensor:
    """Distance of a block's output to the floating-point one, and of what the stage makes of it (RepAPQ's loss).

    Args:
        tail: the floating-point blocks after it in its stage; none for the last one, which has the first term alone.
        wanted: the block's output in floating point. at_end: the stage's.
    """
    distance = F.l1_loss if config.loss == "mae" else F.mse_loss
    out = block(x)
    loss = distance(out, wanted)
    if tail and config.across_block:
        for following in tail:
            out = following(out)
        loss = loss + config.stage_weight * distance(out, at_end)
    return loss


def _calibrate(
    block: _Block, exact: Tensor, x: Tensor, wanted: Tensor, at_end: Tensor, config: RepAPQConfig, seed: int
) -> BlockReport:
    """Search, train, keep the best. ``exact``: input in floating point; ``x``: from the quantized blocks before."""
    _first_scales(block, exact, config)
    layers = {name: layer for name, layer in block.module.named_modules() if isinstance(layer, QuantLayer)}

    @torch.no_grad()
    def look() -> float:
        shown = min(len(x), _LOOKED_AT)
        parts = [slice(first, min(first + _CHUNK, shown)) for first in range(0, shown, _CHUNK)]
        losses = [
            float(block_loss(block.module, block.tail, x[part], wanted[part], at_end[part], config))
            * (part.stop - part.start)
            for part in parts
        ]
        return sum(losses) / shown

    before = best = look()
    held = copy.deepcopy(block.module.state_dict())
    if config.iterations and layers:
        optimizer = torch.optim.Adam(_groups(layers, config))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations)
        generator = torch.Generator().manual_seed(seed)
        for step in range(1, config.iterations + 1):
            index = torch.randperm(len(x), generator=generator)[: config.batch_size]
            _while_learning(layers, config, generator)
            loss = block_loss(block.module, block.tail, x[index], wanted[index], at_end[index], config)
            if config.rounding == "learned":
                loss = loss * wanted.shape[1] + undecided(layers.values(), step / config.iterations)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            _clamp(layers)
            _while_learning(layers, config, None)
            if step % max(1, config.iterations // _LOOKS) == 0 and (seen := look()) < best:
                best, held = seen, copy.deepcopy(block.module.state_dict())
        block.module.load_state_dict(held)
    block.module.requires_grad_(False)
    return BlockReport(block.name, before, best, {name: _facts(layer) for name, layer in layers.items()})


def _while_learning(layers: dict[str, QuantLayer], config: RepAPQConfig, generator: torch.Generator | None) -> None:
    """What only a training step does, drawn from ``generator``; None ends it."""
    for layer in layers.values():
        layer.drop = 0.0 if generator is None else config.drop
        if isinstance(layer, LearnedRounding):
            layer.soft = generator is not None
        if generator is not None:
            layer.generator = generator


def _groups(layers: dict[str, QuantLayer], config: RepAPQConfig) -> list[dict[str, object]]:
    """What is trained, and how fast: scales by a share of themselves, since they differ by orders of magnitude."""
    groups: list[dict[str, object]] = []
    for layer in layers.values():
        layer.requires_grad_(False)
        chosen = [([layer.a_scale], config.scale_rate * float(layer.a_scale))]
        if config.affine:
            chosen.append(([layer.gamma, layer.beta], config.affine_rate))
        if isinstance(layer, LearnedRounding):
            chosen.append(([layer.up], ROUNDING_RATE))
        else:
            chosen.append(([layer.w_scale], config.scale_rate * float(layer.w_scale.mean())))
        if config.train_weights and config.rounding == "nearest":
            chosen.append(([layer.weight], config.rate_of_weights(layer.weight_bits)))
        for parameters, rate in chosen:
            for each in parameters:
                each.requires_grad_(True)
            groups.append({"params": parameters, "lr": rate})
    return groups


@torch.no_grad()
def _clamp(layers: dict[str, QuantLayer]) -> None:
    for layer in layers.values():
        layer.a_scale.clamp_(min=LEAST_ACTIVATION)
        layer.w_scale.abs_().clamp_(min=LEAST_WEIGHT)


@torch.no_grad()
def _facts(layer: QuantLayer) -> dict[str, float]:
    ratio = layer.weight.abs().flatten(1).amax(1) / (layer.w_scale.abs() * (2 ** (layer.weight_bits - 1) - 1))
    return {
        "weight_bits": layer.weight_bits,
        "activation_bits": layer.activation_bits,
        "a_scale": float(layer.a_scale),
        "w_scale_least": float(layer.w_scale.abs().min()),
        "w_scale_largest": float(layer.w_scale.abs().max()),
        "rows_cut_off": float((ratio > 1.01).float().mean()),
    }


def _claim(folder: Path, config: RepAPQConfig, calibration: Tensor, chain: list[Stage]) -> None:
    """Raise `ValueError` if ``folder`` belongs to a run with other settings, images or blocks; else mark it."""
    asked = {
        "config": asdict(config),
        "images": [len(calibration), float(calibration.double().sum()), float(calibration.double().square().sum())],
        "stages": [list(stage.blocks) for stage in chain],
    }
    complaint = f"{folder} belongs to a run with other settings or images; remove it or give another folder"
    _atomic.claim(folder / "run.json", asked, complaint)


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

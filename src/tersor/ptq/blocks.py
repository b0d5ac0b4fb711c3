"""Calibration of one block: first scales, then RepAPQ's loss with the stage's output as further supervision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor._errors import TersorError
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.layers import QuantLayer, operate
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
from tersor.ptq.rounding import ROUNDING_RATE, LearnedRounding, undecided

#: Images that a block computes at once where there are no gradients.
CHUNK = 64
#: The best of so many looks at a block's loss is kept.
_LOOKS = 10
_LOOKED_AT = 256
#: Values of a layer's input that the search for its scale takes.
_SUBSAMPLE = 400_000
#: Of activations and of a row's weights, where ranges are percentiles.
_NORM_OF_8_BITS = 4.0
_PERCENTILE, _WEIGHT_PERCENTILE = 0.999, 0.99


@dataclass(frozen=True)
class BlockReport:
    """What calibration did to a block.

    Args:
        name: The block.
        before: Loss on the calibration images with the first scales.
        after: The same with the kept ones.
        layers: Bits and scales by layer.
    """

    name: str
    before: float
    after: float
    layers: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Block:
    """A block under calibration, what it stands for, and the floating-point blocks after it in its stage."""

    name: str
    module: nn.Module
    exact: nn.Module
    tail: list[nn.Module]


@torch.no_grad()
def run_chunks(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, some images at a time."""
    return torch.cat([module(part) for part in torch.split(x, CHUNK)])


@torch.no_grad()
def _first_scales(block: Block, inputs: Tensor, config: RepAPQConfig) -> None:
    """Search for the scales of a block's layers, with what they get in the floating-point model."""
    layers = {name: layer for name, layer in block.module.named_modules() if isinstance(layer, QuantLayer)}
    taken: dict[str, list[Tensor]] = {name: [] for name in layers}

    def take(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, given, out: taken[name].append(given[0].detach())

    hooks = [block.exact.get_submodule(name).register_forward_hook(take(name)) for name in layers]
    run_chunks(block.exact, inputs[: config.init_images])
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        got = torch.cat(taken[name])
        if not bool(torch.isfinite(got).all()):
            raise TersorError(f"activations of {block.name}.{name} are NaN or infinite; check weights and images")
        scale, zero = activation_scale(got, layer.activation_bits, config)
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
def activation_scale(x: Tensor, bits: int, config: RepAPQConfig) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the activations ``x``, by ``config.activation_init``."""
    if config.symmetric:
        x = torch.cat([x.flatten(), -x.flatten()])
        scale = _scale_of(x, bits, config)[0]
        return scale * (2**bits - 1) / (2**bits - 2), torch.full_like(scale, 2 ** (bits - 1))
    return _scale_of(x, bits, config)


def _scale_of(x: Tensor, bits: int, config: RepAPQConfig) -> tuple[Tensor, Tensor]:
    if config.activation_init == "minmax":
        return cut_activation(x, bits, share=1.0)
    some = x.flatten()[:: max(1, x.numel() // _SUBSAMPLE)]
    if config.activation_init == "percentile":
        return cut_activation(some, bits, share=_PERCENTILE)
    if bits < 8:
        return search_activation(some, bits)
    # Steps are fine, and their errors cancel out in the sums that follow. What is cut off does not, so that it counts
    # for more, and the range is that of all values.
    ends = torch.stack([x.amin(), x.amax()])
    return search_activation(torch.cat([some, ends]), bits, norm=_NORM_OF_8_BITS)


def block_loss(
    block: nn.Module, tail: Sequence[nn.Module], x: Tensor, wanted: Tensor, at_end: Tensor, config: RepAPQConfig
) -> Tensor:
    """Distance of a block's output to the floating-point one, and of what the stage makes of it (RepAPQ's loss).

    Args:
        block: The quantized block.
        tail: The floating-point blocks after it in its stage; none for the last one, which has the first term alone.
        x: Input ``[n, channels, height, width]``, from the quantized blocks before.
        wanted: The block's output in floating point.
        at_end: The stage's output in floating point.
        config: Which distance, and the weight of the stage's term.
    """
    distance = F.l1_loss if config.loss == "mae" else F.mse_loss
    out = block(x)
    loss = distance(out, wanted)
    if tail and config.across_block:
        for following in tail:
            out = following(out)
        loss = loss + config.stage_weight * distance(out, at_end)
    return loss


@torch.enable_grad()
def calibrate_block(
    block: Block, exact: Tensor, x: Tensor, wanted: Tensor, at_end: Tensor, config: RepAPQConfig, seed: int
) -> BlockReport:
    """Search, train, keep the best. ``exact``: input in floating point; ``x``: from the quantized blocks before."""
    _first_scales(block, exact, config)
    layers = {name: layer for name, layer in block.module.named_modules() if isinstance(layer, QuantLayer)}

    @torch.no_grad()
    def look() -> float:
        shown = min(len(x), _LOOKED_AT)
        parts = [slice(first, min(first + CHUNK, shown)) for first in range(0, shown, CHUNK)]
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
            torch.autograd.backward(loss)
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

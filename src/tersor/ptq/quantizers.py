"""Rounding to a few bits with gradients, and the searches for the first scales (RepAPQ)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: Smallest scales: a layer that is always zero still has one.
LEAST_ACTIVATION, LEAST_WEIGHT = 1e-8, 1e-9
#: Ranges that the search over activations tries: all of it, then 1 % less each.
_SHRINKS = 80
WEIGHT_RATIOS = 60


def round_ste(x: Tensor) -> Tensor:
    """Nearest integer, half to even; the gradient passes as if nothing were rounded."""
    return x + (x.round() - x).detach()


def weight_limit(bits: int) -> int:
    """Largest integer of a weight; the smallest is its negative."""
    return (1 << (bits - 1)) - 1


def quantize_activation(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Integers from 0 to 2^bits - 1 as floats: clamp(round(x / s) + z). Gradients flow to ``x`` and ``scale``."""
    return (round_ste(x / scale) + zero).clamp(0, 2**bits - 1)


def fake_activation(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """What the integers of `quantize_activation` stand for."""
    return (quantize_activation(x, scale, zero, bits) - zero) * scale


def quantize_weight(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Integers from -Q to Q as floats, with Q = 2^(bits - 1) - 1 and one ``scale`` ``[out]`` a row."""
    limit = weight_limit(bits)
    return round_ste(weight / rows(scale, weight)).clamp(-limit, limit)


def fake_weight(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """What the integers of `quantize_weight` stand for."""
    return quantize_weight(weight, scale, bits) * rows(scale, weight)


def rows(scale: Tensor, weight: Tensor) -> Tensor:
    """``scale`` ``[out]`` in the shape that multiplies ``weight`` ``[out, ...]`` row by row."""
    return scale.view(-1, *[1] * (weight.ndim - 1))


@torch.no_grad()
def search_activation(x: Tensor, bits: int, *, norm: float = 2.0) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a tensor: of 80 ranges, the one with the smallest mean error to the power ``norm``.

    Zero is always in the range, so that it is exact and padding costs nothing.

    Returns:
        Scale, float32 and above 0, and zero point, an integer as float32; scalars.
    """
    low, high = x.amin().clamp_max(0), x.amax().clamp_min(0)
    best: tuple[float, Tensor, Tensor] | None = None
    for step in range(_SHRINKS):
        share = 1 - 0.01 * step
        scale = ((high - low) * share / (2**bits - 1)).clamp_min(LEAST_ACTIVATION)
        zero = (-low * share / scale).round()
        error = float((fake_activation(x, scale, zero, bits) - x).abs().pow(norm).mean())
        if best is None or error < best[0]:
            best = (error, scale, zero)
    assert best is not None
    return best[1].float(), best[2].float()


@torch.no_grad()
def cut_activation(x: Tensor, bits: int, *, share: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range that holds the middle ``share`` of the values; 1.0 is from least to largest.

    Zero is always in the range.
    """
    if share == 1:
        low, high = x.amin(), x.amax()
    else:
        flat = x.flatten().sort().values
        cut = int((1 - share) / 2 * (len(flat) - 1))
        low, high = flat[cut], flat[len(flat) - 1 - cut]
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).clamp_min(LEAST_ACTIVATION)
    return scale.float(), (-low / scale).round().float()


@torch.no_grad()
def cut_weight(weight: Tensor, bits: int, *, share: float) -> Tensor:
    """Scales ``[out]`` so that ``share`` of a row's entries lie within its grid; 1.0 is the largest of them."""
    sizes = weight.flatten(1).abs().sort(1).values
    return sizes[:, math.ceil(share * sizes.shape[1]) - 1].clamp_min(LEAST_WEIGHT) / weight_limit(bits)


@torch.no_grad()
def search_weight(weight: Tensor, bits: int, *, norm: float = 2.0) -> Tensor:
    """Scales ``[out]`` by the error of the weights themselves: of 80 ranges a row."""
    limit, largest = weight_limit(bits), weight.flatten(1).abs().amax(1).clamp_min(LEAST_WEIGHT)
    best, found = torch.full_like(largest, torch.inf), largest / limit
    for step in range(_SHRINKS):
        scale = largest * (1 - 0.01 * step) / limit
        error = (fake_weight(weight, scale, bits) - weight).abs().pow(norm).flatten(1).mean(1)
        found, best = torch.where(error < best, scale, found), torch.minimum(error, best)
    return found


@torch.no_grad()
def search_weight_by_output(
    weight: Tensor, bits: int, compute: Callable[[Tensor], Tensor], *, norm: float = 2.0, ratios: int = WEIGHT_RATIOS
) -> Tensor:
    """Scales ``[out]`` by what reaches the output, which is what saves merged kernels.

    A row whose largest entry is a thousand times the typical one loses all others when the scale follows that entry,
    and the error of the weights hardly shows it. The inputs know: the large entry meets a channel that is nearly always
    zero.

    Args:
        compute: The layer without bias as a function of its weight, on calibration inputs: ``[batch, out, ...]``.
        ratios: Ranges that are tried, from the whole one to a thousandth in equal factors; rows that end there go on
            to 1e-5.
    """
    limit, largest = weight_limit(bits), weight.flatten(1).abs().amax(1).clamp_min(LEAST_WEIGHT)
    exact = compute(weight)
    best, found = torch.full_like(largest, torch.inf), largest / limit
    factor = 1e-3 ** (1 / (ratios - 1))
    for step in range(ratios + 2 * (ratios - 1) // 3):
        if step >= ratios and not bool((found == largest * factor ** (step - 1) / limit).any()):
            break
        scale = largest * factor**step / limit
        error = (compute(fake_weight(weight, scale, bits)) - exact).abs().pow(norm)
        error = error.transpose(0, 1).flatten(1).mean(1)
        found, best = torch.where(error < best, scale, found), torch.minimum(error, best)
    return found

"""The definition of quantizing and packing, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.lowbit.codes import compute_dtype
from tersor.lowbit.packing import check_bits, pack_half_split


def quantize_pack(x: Tensor, minimum: Tensor, step: Tensor, bits: int, channel_scale: Tensor | None = None) -> Tensor:
    """Quantize ``x`` with known parameters and pack the codes along the last axis.

    ``u = clamp(round((x / c - m) / s), 0, 2**bits - 1)`` in compute precision, rounding half to even. Where a step
    is zero the code is zero, so that the minimum alone is read back; a zero channel scale divides by one.

    Args:
        x: ``[batch, kv_heads, tokens, dim]``, any floating point and any memory layout.
        minimum: Broadcastable to ``x``: ``[batch, kv_heads, 1, dim]`` for keys, ``[batch, 1 or kv_heads, tokens, 1]``
            for values; in storage precision.
        step: As ``minimum``.
        channel_scale: ``c``, ``[batch, kv_heads, 1, dim]`` in storage precision, or None to divide by nothing.

    Returns:
        uint8 ``[batch, kv_heads, tokens, packed_width(dim, bits)]``.

    Raises:
        ValueError: If the bit width has no packed layout.
    """
    check_bits(bits)
    dtype = compute_dtype(x.dtype)
    x = x.to(dtype)
    if channel_scale is not None:
        x = x / _nonzero(channel_scale.to(dtype))
    step = step.to(dtype)
    codes = ((x - minimum.to(dtype)) / _nonzero(step)).round().clamp(0, 2**bits - 1)
    return pack_half_split(codes.masked_fill(step == 0, 0).to(torch.uint8), bits)


def _nonzero(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 1.0, divisor)

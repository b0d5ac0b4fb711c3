"""Affine codecs for cached keys and values (ZipCache, arXiv 2405.14256, section 3).

Axes: ``keys`` and ``values`` are ``[batch, kv_heads, tokens, head_dim]``. A set of numbers that shares one
``(minimum, step)`` pair is coded as ``u = clamp(round((x - minimum) / step), 0, 2**bits - 1)`` and read
back as ``u * step + minimum``.

Parameters are rounded to storage precision *before* the codes are computed, so that encoder and decoder
use the same numbers; all arithmetic is float32 (float64 for float64 input).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor._errors import TersorError
from tersor.lowbit.codes import AffineCodes, compute_dtype
from tersor.lowbit.kernels import get_kernel
from tersor.lowbit.packing import check_bits


def affine_parameters(
    x: Tensor, bits: int, dims: tuple[int, ...], *, valid: Tensor | None, param_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Minimum and step over ``dims``, in storage precision.

    Args:
        x: The numbers, in compute precision.
        valid: Bool, broadcastable to ``x``; ``False`` entries do not count. A set without any valid
            entry gets minimum 0 and step 0.

    The minimum is rounded to storage precision first, and the step is taken from the rounded minimum, so
    that the largest number of a set lands on the last code.
    """
    if valid is None:
        low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    else:
        low = torch.where(valid, x, torch.inf).amin(dims, keepdim=True)
        high = torch.where(valid, x, -torch.inf).amax(dims, keepdim=True)
        empty = low > high
        low, high = low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)
    minimum = low.to(param_dtype)
    step = ((high - minimum.to(x.dtype)) / (2**bits - 1)).clamp_min(0.0).to(param_dtype)
    # A constant set must come back as it is; a step that is only the rounding error of its minimum is no range.
    step = step.masked_fill(high == low, 0.0)
    return minimum, step


def affine_encode(
    x: Tensor, bits: int, dims: tuple[int, ...], *, valid: Tensor | None, param_dtype: torch.dtype
) -> AffineCodes:
    """Quantize ``x`` ``[batch, kv_heads, tokens, dim]`` with one parameter pair per set spanning ``dims``."""
    check_bits(bits)
    wide = x.to(compute_dtype(x.dtype))
    minimum, step = affine_parameters(wide, bits, dims, valid=valid, param_dtype=param_dtype)
    codes = get_kernel("quantize_pack", device=x.device.type)(x, minimum, step, bits)
    return AffineCodes(codes, minimum, step, bits, x.shape[-1])


def encode_keys_channelwise(
    keys: Tensor, bits: int, *, valid: Tensor | None = None, param_dtype: torch.dtype = torch.float16
) -> AffineCodes:
    """Keys with one ``(minimum, step)`` per sample, head and channel, over the tokens (paper, section 3.2).

    Args:
        keys: ``[batch, kv_heads, tokens, head_dim]``.
        valid: Bool ``[batch, 1 or kv_heads, tokens]``; invalid tokens do not shape the parameters.

    Returns:
        codes with ``minimum`` and ``step`` of shape ``[batch, kv_heads, 1, head_dim]``.
    """
    mask = None if valid is None else valid[..., None]
    if keys.shape[-2] == 0:
        raise TersorError("keys hold no token; an empty group has no parameters, leave it out")
    return affine_encode(keys, bits, (-2,), valid=mask, param_dtype=param_dtype)


def channel_scale(
    values: Tensor,
    *,
    power: float = 0.5,
    valid: Tensor | None = None,
    param_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """``c_i = (max_t |v_ti|) ** power`` per sample, head and channel (paper, equation of CSTQuant).

    ``power=0.5`` is the paper's square root, which halves the spread between channels in log scale; 1 divides
    by the maximum, 0 leaves the values alone. A channel of zeros has scale 0.

    Returns:
        ``[batch, kv_heads, 1, head_dim]`` in storage precision.
    """
    magnitude = values.to(compute_dtype(values.dtype)).abs()
    if valid is not None:
        magnitude = magnitude.masked_fill(~valid[..., None], 0.0)
    largest = magnitude.amax(-2, keepdim=True)
    scale = torch.where(largest > 0, largest**power, 0.0)
    return scale.to(param_dtype)


def encode_values_channel_separable(
    values: Tensor,
    bits: int,
    scale: Tensor,
    *,
    per_head: bool = False,
    valid: Tensor | None = None,
    param_dtype: torch.dtype = torch.float16,
) -> AffineCodes:
    """Channel-separable tokenwise values: divide by the channel scale, then quantize each token (section 3.3).

    Args:
        values: ``[batch, kv_heads, tokens, head_dim]``.
        scale: From `channel_scale`, over *all* tokens of the segment; zero channels are left as zeros.
        per_head: Whether to have one parameter pair per token and head instead of one per token.
        valid: Bool ``[batch, 1 or kv_heads, tokens]``; only needed so that unused slots stay finite.

    Returns:
        codes with ``minimum`` and ``step`` of shape ``[batch, 1 or kv_heads, tokens, 1]``; read back by
        ``decode() * scale``.
    """
    check_bits(bits)
    if valid is not None:
        values = values.masked_fill(~valid[..., None], 0.0)
    wide = scale.to(compute_dtype(values.dtype))
    weighted = values.to(wide.dtype) / torch.where(wide == 0, 1.0, wide)
    dims = (-1,) if per_head else (-3, -1)
    minimum, step = affine_parameters(weighted, bits, dims, valid=None, param_dtype=param_dtype)
    codes = get_kernel("quantize_pack", device=values.device.type)(values, minimum, step, bits, scale)
    return AffineCodes(codes, minimum, step, bits, values.shape[-1])

"""Quantizing and packing on a GPU: one pass that reads the numbers and writes the packed codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.lowbit.kernels.quantize_pack import reference
from tersor.lowbit.packing import PLANES, check_bits, packed_width, plane_width

BLOCK_ROWS = 64


def quantize_pack(x: Tensor, minimum: Tensor, step: Tensor, bits: int, channel_scale: Tensor | None = None) -> Tensor:
    """As `reference.quantize_pack`, byte for byte; float64 input is left to the reference."""
    check_bits(bits)
    if x.dtype == torch.float64:
        return reference.quantize_pack(x, minimum, step, bits, channel_scale)
    batch, heads, tokens, dim = x.shape
    minimum, step = minimum.expand(x.shape), step.expand(x.shape)
    scale = x if channel_scale is None else channel_scale.expand(x.shape)
    packed = torch.empty(batch, heads, tokens, packed_width(dim, bits), dtype=torch.uint8, device=x.device)
    rows, offset = batch * heads * tokens, 0
    for plane_bits, place in PLANES[bits] if packed.numel() else ():
        width = plane_width(dim, plane_bits)
        _quantize_pack_kernel[(triton.cdiv(rows, BLOCK_ROWS),)](
            x,
            minimum,
            step,
            scale,
            packed[..., offset:],
            rows,
            heads,
            tokens,
            *x.stride(),
            *minimum.stride(),
            *step.stride(),
            *scale.stride(),
            PACKED_WIDTH=packed.shape[-1],
            DIM=dim,
            WIDTH=width,
            BITS=bits,
            PLANE_BITS=plane_bits,
            PLACE=place,
            SCALED=channel_scale is not None,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_WIDTH=triton.next_power_of_2(width),
        )
        offset += width
    return packed


@triton.jit
def _quantize_pack_kernel(
    x,
    minimum,
    step,
    scale,
    packed,
    rows,
    heads,
    tokens,
    x_batch,
    x_head,
    x_token,
    x_channel,
    minimum_batch,
    minimum_head,
    minimum_token,
    minimum_channel,
    step_batch,
    step_head,
    step_token,
    step_channel,
    scale_batch,
    scale_head,
    scale_token,
    scale_channel,
    PACKED_WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    PLANE_BITS: tl.constexpr,
    PLACE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """One plane of ``BLOCK_ROWS`` rows; a row is one token of one head of one sample."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    byte = tl.arange(0, BLOCK_WIDTH)[None, :]
    token, head, batch = row % tokens, row // tokens % heads, row // tokens // heads
    x += batch * x_batch + head * x_head + token * x_token
    minimum += batch * minimum_batch + head * minimum_head + token * minimum_token
    step += batch * step_batch + head * step_head + token * step_token
    scale += batch * scale_batch + head * scale_head + token * scale_token
    inside = (row < rows) & (byte < WIDTH)
    result = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.uint8)
    for slot in tl.static_range(8 // PLANE_BITS):
        channel = slot * WIDTH + byte
        real = inside & (channel < DIM)
        number = tl.load(x + channel * x_channel, mask=real, other=0.0).to(tl.float32)
        low = tl.load(minimum + channel * minimum_channel, mask=real, other=0.0).to(tl.float32)
        width = tl.load(step + channel * step_channel, mask=real, other=0.0).to(tl.float32)
        if SCALED:
            divisor = tl.load(scale + channel * scale_channel, mask=real, other=1.0).to(tl.float32)
            number = tl.div_rn(number, tl.where(divisor == 0.0, 1.0, divisor))
        # Divisions round as IEEE says: the ordinary one is off by an ulp on a GPU, and that moves codes.
        code = tl.div_rn(number - low, tl.where(width == 0.0, 1.0, width))
        code = tl.minimum(tl.maximum(code, 0.0), 2.0**BITS - 1.0)
        # Adding 1.5 * 2**23 leaves no fraction bits, which rounds half to even, as torch does.
        code = (code + 12582912.0) - 12582912.0
        code = tl.where(width == 0.0, 0.0, code).to(tl.int32)
        code = (code >> PLACE) & ((1 << PLANE_BITS) - 1)
        result |= (code << (slot * PLANE_BITS)).to(tl.uint8)
    tl.store(packed + row * PACKED_WIDTH + byte, result, mask=inside)

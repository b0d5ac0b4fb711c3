"""Products with packed deltas on a GPU: codes are unpacked in registers and multiplied tile by tile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.lowbit.kernels import triton_runtime
from tersor.lowbit.kernels.delta_linear import DeltaGroup, PackedDelta, check_delta_linear, reference
from tersor.lowbit.packing import PLANES, plane_width

BLOCK_ROWS, BLOCK_OUT, BLOCK_BYTES = 16, 64, 32


def delta_linear(x: Tensor, y: Tensor, groups: Sequence[DeltaGroup]) -> Tensor:
    """As `reference.delta_linear`, in place of ``y`` where that is contiguous; float64 is left to the reference.

    Not differentiable: where gradients are wanted, take the reference.
    """
    check_delta_linear(x, y, groups)
    if torch.float64 in (x.dtype, y.dtype):
        return reference.delta_linear(x, y, groups)
    x, y = x.contiguous(), y.contiguous()
    for delta, rows in groups:
        count = len(x) if rows is None else len(rows)
        if count:
            _launch(x, y, delta, None if rows is None else rows.contiguous(), count)
    return y


def _launch(x: Tensor, y: Tensor, delta: PackedDelta, rows: Tensor | None, count: int) -> None:
    out = y.shape[1]
    low, *high = (bits for bits, _ in PLANES[delta.bits])
    grid = (triton.cdiv(count, BLOCK_ROWS), triton.cdiv(out, BLOCK_OUT))
    _delta_linear_kernel[grid](
        x,
        y,
        rows,
        *delta.tensors,
        count,
        out,
        delta.salient_index.numel(),
        delta.zero,
        DIM=delta.dim,
        CODE_WIDTH=delta.codes.shape[1],
        LOW_BITS=low,
        LOW_WIDTH=plane_width(delta.dim, low),
        HIGH_BITS=high[0] if high else 0,
        # Eight bits and a half have one bit too many for bfloat16, which the interpreter cannot multiply at all.
        WIDE=x.dtype == torch.float32 or delta.bits == 8 or triton_runtime.interpreting(),
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_OUT=BLOCK_OUT,
        BLOCK_BYTES=BLOCK_BYTES,
    )


@triton.jit
def _plane_sums(
    total,
    x,
    codes,
    here,
    real,
    scale,
    zero,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """``total`` plus the sums over one plane, whose code ``u`` stands for ``scale * u - zero``.

    ``x`` and ``codes`` point to the first number and byte of each row and output.
    """
    for start in range(0, WIDTH, BLOCK_BYTES):
        byte = start + tl.arange(0, BLOCK_BYTES)
        word = tl.load(codes[:, None] + byte[None, :], mask=real[:, None] & (byte < WIDTH)[None, :], other=0)
        for slot in tl.static_range(8 // BITS):
            channel = slot * WIDTH + byte
            inside = here[:, None] & ((byte < WIDTH) & (channel < DIM))[None, :]
            number = tl.load(x[:, None] + channel[None, :], mask=inside, other=0.0)
            code = (word >> (slot * BITS)) & ((1 << BITS) - 1)
            value = tl.trans(code.to(tl.float32) * scale - zero)
            if WIDE:
                total = tl.dot(number.to(tl.float32), value, total, input_precision="ieee")
            else:
                total = tl.dot(number, value.to(number.dtype), total)
    return total


@triton.jit
def _delta_linear_kernel(
    x,
    y,
    rows,
    codes,
    step,
    salient_index,
    salient_weight,
    count,
    out,
    salient,
    zero,
    DIM: tl.constexpr,
    CODE_WIDTH: tl.constexpr,
    LOW_BITS: tl.constexpr,
    LOW_WIDTH: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """``BLOCK_ROWS`` rows of one group by ``BLOCK_OUT`` outputs."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    output = tl.program_id(1).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    here, real = row < count, output < out
    if rows is not None:
        row = tl.load(rows + row, mask=here, other=0)
    x += row * DIM
    codes += output * CODE_WIDTH
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    total = _plane_sums(total, x, codes, here, real, 1.0, zero, DIM, LOW_WIDTH, LOW_BITS, WIDE, BLOCK_BYTES)
    if HIGH_BITS > 0:  # the high bit of three counts four
        total = _plane_sums(
            total, x, codes + LOW_WIDTH, here, real, 4.0, 0.0, DIM, CODE_WIDTH - LOW_WIDTH, HIGH_BITS, WIDE, BLOCK_BYTES
        )
    total *= tl.load(step + output, mask=real, other=0.0).to(tl.float32)[None, :]
    for k in range(salient):
        number = tl.load(x + tl.load(salient_index + k), mask=here, other=0.0).to(tl.float32)
        kept = tl.load(salient_weight + output * salient + k, mask=real, other=0.0).to(tl.float32)
        total += number[:, None] * kept[None, :]
    place = y + row[:, None] * out + output[None, :]
    inside = here[:, None] & real[None, :]
    total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(y.dtype.element_ty), mask=inside)

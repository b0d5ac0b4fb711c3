"""The definition of products with packed deltas in plain torch, a tile of outputs at a time.

The step leaves the sum over input channels, so codes stay small whole (or half) numbers:

    y_tj += s_j sum_i x_ti (u_ji - zero) + sum_{i in S} x_ti R_ji

with ``R`` what the codes leave of the salient channels ``S`` (ME-Switch, arXiv 2406.09041).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.lowbit.kernels.delta_linear import DeltaGroup, PackedDelta, check_delta_linear
from tersor.lowbit.packing import unpack_half_split

#: Codes that are unpacked at a time: the workspace is at most four bytes for each.
TILE_CODES = 2**22


def delta_linear(x: Tensor, y: Tensor, groups: Sequence[DeltaGroup]) -> Tensor:
    """``y`` with each group's product added to its rows; rows in no group stay the base's.

    Args:
        x: ``[n, in]``, the inputs of the base's linear; float32, float16, bfloat16 or float64.
        y: ``[n, out]``, the base's outputs; its memory may be written to and returned.
        groups: Which rows get which delta. No row may be in two groups.

    Returns:
        ``[n, out]`` in the dtype of ``y``; sums are float32 (float64 for float64) and rounded once.

    Raises:
        ValueError: If shapes do not belong together.
    """
    check_delta_linear(x, y, groups)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    result = y.to(dtype)
    for delta, rows in groups:
        if rows is None:
            result = result + product(x.to(dtype), delta)
        else:
            result = result.index_add(0, rows, product(x[rows].to(dtype), delta))
    return result.to(y.dtype)


def product(x: Tensor, delta: PackedDelta) -> Tensor:
    """``x D^T`` for ``x`` ``[n, in]``, in its dtype."""
    outs = max(1, TILE_CODES // delta.dim)
    tiles = []
    for start in range(0, delta.step.numel(), outs):
        tile = slice(start, start + outs)
        codes = unpack_half_split(delta.codes[tile], delta.bits, delta.dim).to(x.dtype) - delta.zero
        tiles.append(x @ codes.T * delta.step[tile].to(x.dtype))
    salient = x[:, delta.salient_index.long()] @ delta.salient_weight.to(x.dtype).T
    return torch.cat(tiles, dim=1) + salient

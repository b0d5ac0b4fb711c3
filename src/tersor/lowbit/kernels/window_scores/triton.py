"""Window scores on a GPU: one program for a block of the window's columns, over all heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.lowbit.kernels import mask_strides
from tersor.lowbit.kernels.window_scores import reference

BLOCK_COLUMNS = 32


def window_scores(
    query: Tensor,
    keys: Tensor,
    lse: Tensor,
    steps: Tensor,
    places: Sequence[tuple[int, int, int]],
    *,
    tokens: int,
    scaling: float,
    mask: Tensor | None = None,
) -> None:
    """As `reference.window_scores`; a launch for each query, which is one while tokens are decoded one by one."""
    batch, heads, queries, dim = query.shape
    if query.dtype == torch.float64:
        reference.window_scores(query, keys, lse, steps, places, tokens=tokens, scaling=scaling, mask=mask)
        return
    scopes = steps.shape[2] - 1
    strides = (0, 0, 0) if mask is None else mask_strides(mask)
    for index, row, fold in places:
        _window_scores_kernel[(triton.cdiv(keys.shape[2], BLOCK_COLUMNS), batch)](
            query[:, :, index],
            keys,
            lse[:, :, index],
            steps,
            mask,
            *query.stride()[:2],
            *lse.stride()[:2],
            *strides,
            0 if mask is None else mask.shape[-1],
            index,
            row,
            fold,
            tokens,
            tokens - queries + index + 1,
            keys.shape[2],
            steps.shape[1],
            scaling,
            KV_HEADS=keys.shape[1],
            GROUP=heads // keys.shape[1],
            SCOPES=scopes,
            DIM=dim,
            BLOCK_DIM=triton.next_power_of_2(dim),
            BLOCK_COLUMNS=BLOCK_COLUMNS,
        )


_UNSPECIALIZED = ["sequence", "index", "row", "fold", "tokens", "seen", "slots", "rows", "mask_batch", "mask_query"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _window_scores_kernel(
    query,
    keys,
    lse,
    steps,
    mask,
    query_batch,
    query_head,
    lse_batch,
    lse_head,
    mask_batch,
    mask_query,
    mask_token,
    sequence,
    index,
    row,
    fold,
    tokens,
    seen,
    slots,
    rows,
    scaling,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SCOPES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Scores of one query for a block of columns: fold the row's older step, then write the new one."""
    batch = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    channel = tl.arange(0, BLOCK_DIM)
    here, real = column < slots, column < seen
    opened = real
    if mask is not None:
        at = batch * mask_batch + index * mask_query + (sequence - tokens + column) * mask_token
        opened = real & (tl.load(mask + at, mask=real, other=0) != 0)
    older = steps + batch * rows * (SCOPES + 1) * slots + column
    own = older + row * (SCOPES + 1) * slots
    mean = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for head in range(KV_HEADS):
        inside = real[:, None] & (channel < DIM)[None, :]
        place = ((batch * KV_HEADS + head) * slots + column)[:, None] * DIM + channel[None, :]
        key = tl.load(keys + place, mask=inside, other=0.0).to(tl.float32)
        weights = tl.zeros([BLOCK_COLUMNS], tl.float32)
        for member in range(GROUP):
            which = head * GROUP + member
            vector = tl.load(query + batch * query_batch + which * query_head + channel, mask=channel < DIM, other=0.0)
            score = tl.sum(key * (vector.to(tl.float32) * scaling)[None, :], 1)
            whole = tl.load(lse + batch * lse_batch + which * lse_head)
            weights += tl.where(opened, tl.exp(score - whole), 0.0)
        weights /= GROUP
        if SCOPES == 1:
            mean += weights / KV_HEADS
        else:
            _write(older, own, weights, head, slots, fold, here)
    if SCOPES == 1:
        _write(older, own, mean, 0, slots, fold, here)
    _write(older, own, tl.where(real, 1.0, 0.0), SCOPES, slots, fold, here)


@triton.jit
def _write(older, own, weights, scope, slots, fold, here):
    """One scope of a step: what its row held goes to the sum of the older steps where ``fold``."""
    before = tl.load(own + scope * slots, mask=here & (fold != 0), other=0.0)
    summed = tl.load(older + scope * slots, mask=here, other=0.0)
    tl.store(older + scope * slots, summed + before, mask=here & (fold != 0))
    tl.store(own + scope * slots, weights, mask=here)

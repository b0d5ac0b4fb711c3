"""The definition of probe sums in plain torch, a tile of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.lowbit.codes import compute_dtype

#: Numbers in the largest tile of attention, across batch and heads (64 MiB of float32).
TILE_NUMBERS = 2**24


def attention_rows(
    query: Tensor,
    keys: Tensor,
    allowed: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Rows of the attention matrix, averaged over the query heads of each KV head.

    Args:
        query: The rows, ``[batch, heads, rows, dim]``.
        keys: ``[batch, kv_heads, columns, dim]``; with ``lse`` any subset of the columns will do.
        allowed: Where a row may look, bool ``[batch or 1, rows, columns]``.
        scaling: Factor of the scores.
        softcap: Limit of the scores where the model has one, or None.
        lse: Log-sum-exp of each whole row, ``[batch, heads, rows]``; without it, the softmax runs over the given keys.

    Returns:
        ``[batch, kv_heads, rows, columns]`` in compute precision; rows that may look nowhere are zero.
    """
    batch, heads, rows, dim = query.shape
    kv_heads = keys.shape[1]
    dtype = compute_dtype(query.dtype)
    grouped = query.to(dtype).reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    # In place where possible: for a long prompt a pass over the scores costs as much as computing them.
    scores = (grouped @ keys.to(dtype).transpose(-1, -2)).mul_(scaling)
    scores = scores.reshape(batch, kv_heads, -1, rows, keys.shape[2])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores.masked_fill_(~allowed[:, None, None], -torch.inf)
    if lse is None:
        weights = scores.softmax(-1)
        # The gradient of a softmax needs what it returned.
        return (weights.nan_to_num(0.0) if weights.requires_grad else weights.nan_to_num_(0.0)).mean(2)
    return (scores - lse.to(dtype).reshape(batch, kv_heads, -1, rows, 1)).exp().mean(2)


def probe_sums(
    query: Tensor,
    keys: Tensor,
    rows: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    lse: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """Sum of `attention_rows` over some rows.

    Args:
        query: The newest tokens, ``[batch, heads, new, dim]``.
        keys: ``[batch, kv_heads, columns, dim]``, whose last ``new`` columns are those tokens.
        rows: Which of the new tokens are probed, int64 ``[rows]`` and ascending.
        scaling: See `attention_rows`, as for the next two.
        softcap: See `attention_rows`.
        lse: Of all new tokens, ``[batch, heads, new]``.
        allowed: Where a probed row may look, bool ``[batch or 1, rows, columns]``; None for plain causal attention.

    Returns:
        ``[batch, kv_heads, columns]`` in compute precision; what a row gives is nothing where it holds NaN.
    """
    batch, heads, new, _ = query.shape
    columns = keys.shape[2]
    tile = max(1, TILE_NUMBERS // max(1, batch * heads * columns))
    total = keys.new_zeros(batch, keys.shape[1], columns, dtype=compute_dtype(query.dtype))
    place = torch.arange(columns, device=keys.device)
    for start in range(0, len(rows), tile):
        part = rows[start : start + tile]
        seen = (place <= part[:, None] + columns - new)[None] if allowed is None else allowed[:, start : start + tile]
        own = None if lse is None else lse[:, :, part]
        weights = attention_rows(query[:, :, part], keys, seen, scaling=scaling, softcap=softcap, lse=own)
        total = total + weights.sum(2)
    return total

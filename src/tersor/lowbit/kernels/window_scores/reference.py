"""The definition of window scores in plain torch, a step at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tersor.lowbit.codes import compute_dtype


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
    """Write the attention of some queries to ``steps``.

    Args:
        query: ``[batch, heads, queries, key_dim]``, of the newest tokens of the window.
        keys: ``[batch, kv_heads, slots, key_dim]``, those of the window.
        lse: Log-sum-exp of the queries' whole rows, ``[batch, heads, queries]``.
        steps: ``[batch, 1 + kept, scopes + 1, slots]``, changed in place; ``scopes`` is 1, for the mean of all heads,
            or the number of KV heads. Columns behind a step's own token stay zero.
        places: For each query to score, in order: its index, the row of ``steps`` to write, and 1 where that row holds
            an older step, which is added to row 0 first.
        tokens: Slots in use, those of the queries included.
        scaling: Factor of the scores.
        mask: True where a query may look, bool ``[batch or 1, 1, queries, sequence]``, whose end is the window; None
            for all up to its own token.
    """
    batch, _, queries, dim = query.shape
    dtype = compute_dtype(query.dtype)
    for index, row, fold in places:
        seen = tokens - queries + index + 1
        grouped = query[:, :, index].to(dtype).reshape(batch, keys.shape[1], -1, dim) * scaling
        scores = grouped @ keys[:, :, :seen].to(dtype).transpose(-1, -2)
        weights = (scores - lse[:, :, index].to(dtype).reshape(batch, keys.shape[1], -1, 1)).exp()
        if mask is not None:
            first = mask.shape[-1] - tokens
            weights = weights.masked_fill(~mask[:, :, index : index + 1, first : first + seen], 0.0)
        write_step(steps, row, fold, weights.mean(2))


def write_step(steps: Tensor, row: int, fold: int, weights: Tensor) -> None:
    """Write the attention ``[batch, kv_heads, tokens up to its own]`` of one step; see `window_scores`."""
    scopes, seen = steps.shape[2] - 1, weights.shape[-1]
    if fold:
        steps[:, 0] += steps[:, row]
    steps[:, row, :scopes, :seen] = weights if scopes == weights.shape[1] else weights.mean(1, keepdim=True)
    steps[:, row, scopes, :seen] = 1.0
    steps[:, row, :, seen:] = 0.0

"""The definition of packed attention in plain torch, a tile of tokens at a time.

For one group of one KV head with codes ``u`` the parameters leave the inner loop:

    q . k_t = sum_c (q_c s_c) u_tc + sum_c q_c m_c          the step goes into the query, the minima are one bias
    o_c     = c_c (sum_t (p_t s_t) u_tc + sum_t p_t m_t)    the step goes into the weights, the minima are one scalar

so both products are "small integer times float" and no dequantized key or value exists. Where layers share codes,
token ``t`` has a key factor ``a_t`` and a value factor ``b_t`` of each layer's own (MiniCache): the
score is multiplied by ``a_t`` and the weight by ``b_t``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tersor._errors import TersorError
from tersor.lowbit.codes import compute_dtype
from tersor.lowbit.kernels.packed_attention import PackedPart, Part, RawPart, Window

TILE_TOKENS = 512


def packed_attention(
    query: Tensor,
    parts: Sequence[Part],
    window: Window | None = None,
    *,
    scaling: float,
    mask: Tensor | None = None,
    score_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of ``parts`` and ``window``.

    Args:
        query: ``[batch, heads, queries, key_dim]``; ``heads`` is a multiple of the parts' KV heads.
        parts: Tokens that every query may see, but for the mask.
        window: The newest tokens, to which those of the queries belong.
        scaling: Factor of the scores, usually ``key_dim ** -0.5``.
        mask: True where a query may look, bool ``[batch or 1, 1, queries, sequence]``; the window is the end of the
            sequence. None where the order of the window's tokens says it all.
        score_bias: Added to the scaled scores of the parts, by position, float32 ``[batch, heads, queries, sequence]``:
            what a query gets from a part of the keys that is known without storing it.

    Returns:
        output ``[batch, heads, queries, value_dim]`` and log-sum-exp of the scaled scores
        ``[batch, heads, queries]``, both in compute precision. A query that may look nowhere gets zeros
        and ``-inf``.

    Raises:
        ValueError: without any token.
    """
    read: list[Part] = [part for part in parts if part.tokens]
    if window is not None and window.tokens:
        read.append(RawPart(window.keys[:, :, : window.tokens], window.values[:, :, : window.tokens]))
    if not read:
        raise TersorError("attention needs at least one part with tokens, got none")
    batch, heads, queries, dim = query.shape
    kv_heads = read[0].kv_heads
    grouped = query.to(compute_dtype(query.dtype)).reshape(batch, kv_heads, -1, dim) * scaling
    state: _Running | None = None
    for place, part in enumerate(read):
        if place < len(read) - 1 or window is None or not window.tokens:
            opened, bias = _open(part, mask), _bias(part, score_bias, heads)
        else:
            opened, bias = _open_window(window, queries, mask), None
        tiles = _packed_tiles(grouped, part, bias) if isinstance(part, PackedPart) else _raw_tile(grouped, part, bias)
        for scores, tile, weigh in tiles:
            state = _merge(state, _masked(scores, opened, tile, queries), weigh)
    assert state is not None  # a part holds at least one tile
    peak, total, output = state
    lse = (peak + total.log()).reshape(batch, heads, queries)
    output = output / total.clamp_min(torch.finfo(total.dtype).tiny)[..., None]
    return output.reshape(batch, heads, queries, -1), lse


def _open(part: Part, mask: Tensor | None) -> Tensor | None:
    """Where a query may look in a part, bool ``[batch, 1 or kv_heads, queries or 1, tokens]``; None for everywhere."""
    valid = None if part.valid is None else part.valid[:, :, None, :]
    if mask is None or part.positions is None:
        return valid
    columns = _columns(mask, part.positions, part.positions.shape[1])
    return columns if valid is None else columns & valid


def _open_window(window: Window, queries: int, mask: Tensor | None) -> Tensor | None:
    tokens = window.tokens
    if mask is not None:
        return mask[..., mask.shape[-1] - tokens :]
    valid = None if window.valid is None else window.valid[:, None, None, :tokens]
    if queries == 1:
        return valid
    place = torch.arange(tokens, device=window.keys.device)
    causal = (place <= place[tokens - queries :, None])[None, None]
    return causal if valid is None else causal & valid


def _bias(part: Part, score_bias: Tensor | None, heads: int) -> Tensor | None:
    return None if score_bias is None or part.positions is None else _columns(score_bias, part.positions, heads)


def _columns(rows: Tensor, positions: Tensor, heads: int) -> Tensor:
    """Columns ``positions`` of ``rows`` ``[batch or 1, 1 or heads, queries, sequence]``, for ``heads`` heads."""
    batch, scopes, _ = positions.shape
    index = positions.long().repeat_interleave(heads // scopes, dim=1)[:, :, None, :]
    return rows.expand(batch, heads, -1, -1).gather(-1, index.expand(-1, -1, rows.shape[2], -1))


# Row maximum [b, k, r], sum of exponentials [b, k, r] and weighted output [b, k, r, value_dim].
_Running = tuple[Tensor, Tensor, Tensor]
# Weights [b, k, r, tokens] to the weighted sum of a tile's values [b, k, r, value_dim].
_Weigh = Callable[[Tensor], Tensor]


def _merge(state: _Running | None, scores: Tensor, weigh: _Weigh) -> _Running:
    """The (max, sum, weighted output) recurrence: fold one tile of ``scores`` ``[b, k, r, tokens]`` in."""
    peak = scores.amax(-1)
    if state is not None:
        peak = torch.maximum(peak, state[0])
    # A row that has seen no open token yet keeps -inf as its peak; shift by 0 there, so that exp gives 0, not NaN.
    shift = peak.masked_fill(peak == -torch.inf, 0.0)
    weights = (scores - shift[..., None]).exp()
    total, output = weights.sum(-1), weigh(weights)
    if state is not None:
        decay = (state[0] - shift).exp()
        total = total + decay * state[1]
        output = output + decay[..., None] * state[2]
    return peak, total, output


def _packed_tiles(query: Tensor, part: PackedPart, bias: Tensor | None) -> Iterator[tuple[Tensor, slice, _Weigh]]:
    dtype = query.dtype
    keys, values = part.keys, part.values
    stepped = query * keys.step.to(dtype)
    minima = (query * keys.minimum.to(dtype)).sum(-1, keepdim=True)
    scale = part.channel_scale.to(dtype)
    step, minimum = values.step.to(dtype)[..., 0], values.minimum.to(dtype)[..., 0]
    tokens = keys.codes.shape[-2]
    for start in range(0, tokens, TILE_TOKENS):
        tile = slice(start, min(start + TILE_TOKENS, tokens))
        scores = stepped @ keys.unpack(tile.start, tile.stop).to(dtype).transpose(-1, -2) + minima
        scores = _times(scores, part.key_factor, tile)
        if bias is not None:
            scores = scores + bias[..., tile].to(dtype).reshape(scores.shape)

        def weigh(weights: Tensor, tile: slice = tile) -> Tensor:
            weights = _times(weights, part.value_factor, tile)
            codes = values.unpack(tile.start, tile.stop).to(dtype)
            product = (weights * step[:, :, None, tile]) @ codes
            return scale * (product + (weights * minimum[:, :, None, tile]).sum(-1, keepdim=True))

        yield scores, tile, weigh


def _raw_tile(query: Tensor, part: RawPart, bias: Tensor | None) -> Iterator[tuple[Tensor, slice, _Weigh]]:
    keys, values = part.keys.to(query.dtype), part.values.to(query.dtype)
    scores = _times(query @ keys.transpose(-1, -2), part.key_factor)
    if bias is not None:
        scores = scores + bias.to(query.dtype).reshape(scores.shape)
    yield scores, slice(None), lambda weights: _times(weights, part.value_factor) @ values


def _times(rows: Tensor, factor: Tensor | None, tile: slice = slice(None)) -> Tensor:
    """Multiply ``rows`` ``[b, k, r, tokens]`` by a factor per token."""
    return rows if factor is None else rows * factor[:, :, None, tile].to(rows.dtype)


def _masked(scores: Tensor, opened: Tensor | None, tile: slice, queries: int) -> Tensor:
    """Close the other tokens. Score rows are (query head within the group, query) pairs of one KV head."""
    if opened is None:
        return scores
    batch, kv_heads, rows, tokens = scores.shape
    by_query = scores.reshape(batch, kv_heads, rows // queries, queries, tokens)
    closed = ~opened[:, :, None, :, tile]
    return by_query.masked_fill(closed, -torch.inf).reshape(scores.shape)

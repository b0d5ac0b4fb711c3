"""Attention of a few queries over packed token groups and raw tokens, merged by log-sum-exp."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tersor.lowbit.codes import AffineCodes


@dataclass
class PackedPart:
    """One packed token group as the kernel reads it.

    Args:
        keys: Channelwise codes.
        values: Channel-separable tokenwise codes.
        channel_scale: ``[batch, kv_heads, 1, value_dim]``.
        mask: Bool, broadcastable to ``[batch, kv_heads, queries, tokens]``, True where a query may look; None where
            every token is open to every query.
        key_factor: ``[batch, 1 or kv_heads, tokens]`` or None. Where layers share one set of codes, a layer's own
            lengths: a token's key is what the codes say, times its factor.
        value_factor: The same for values.
        score_bias: float32 ``[batch, heads, queries, tokens]`` or None, added to the scaled scores: what a query gets
            from a part of the keys that is known without storing it.
    """

    keys: AffineCodes
    values: AffineCodes
    channel_scale: Tensor
    mask: Tensor | None = None
    key_factor: Tensor | None = None
    value_factor: Tensor | None = None
    score_bias: Tensor | None = None


@dataclass
class RawPart:
    """Unpacked tokens: ``keys``/``values`` ``[batch, kv_heads, tokens, head_dim]``; the rest as in `PackedPart`."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    key_factor: Tensor | None = None
    value_factor: Tensor | None = None


Part = PackedPart | RawPart

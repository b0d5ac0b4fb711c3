"""Attention of a few queries over packed token groups and raw tokens, merged by log-sum-exp."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tersor.lowbit.codecs import AffineCodes


@dataclass
class PackedPart:
    """One packed token group as the kernel reads it.

    ``keys``: channelwise codes; ``values``: channel-separable tokenwise codes; ``channel_scale``:
    ``[batch, kv_heads, 1, value_dim]``. ``mask``: bool, broadcastable to ``[batch, kv_heads, queries,
    tokens]``, True where a query may look; None where every token is open to every query.
    """

    keys: AffineCodes
    values: AffineCodes
    channel_scale: Tensor
    mask: Tensor | None = None


@dataclass
class RawPart:
    """Unpacked tokens: ``keys``/``values`` ``[batch, kv_heads, tokens, head_dim]``; ``mask`` as in `PackedPart`."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None


Part = PackedPart | RawPart

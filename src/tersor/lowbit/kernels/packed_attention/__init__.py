"""Attention of a few queries over packed token groups and raw tokens, merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tersor.lowbit.codes import AffineCodes


@dataclass
class PackedPart:
    """One packed token group as the kernel reads it.

    Args:
        keys: Channelwise codes.
        values: Channel-separable tokenwise codes.
        channel_scale: ``[batch, kv_heads, 1, value_dim]``.
        positions: The tokens' columns of the call's mask and score bias, int32 ``[batch, 1 or kv_heads, tokens]``;
            None where calls have neither.
        valid: False for slots that hold no token, bool ``[batch, 1 or kv_heads, tokens]``; None without any.
        key_factor: ``[batch, 1 or kv_heads, tokens]`` or None. Where layers share one set of codes, a layer's own
            lengths: a token's key is what the codes say, times its factor.
        value_factor: The same for values.
    """

    keys: AffineCodes
    values: AffineCodes
    channel_scale: Tensor
    positions: Tensor | None = None
    valid: Tensor | None = None
    key_factor: Tensor | None = None
    value_factor: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.keys.codes.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.keys.codes.shape[1]

    @property
    def value_dim(self) -> int:
        return self.values.dim


@dataclass
class RawPart:
    """Unpacked tokens: ``keys``/``values`` ``[batch, kv_heads, tokens, head_dim]``; the rest as in `PackedPart`."""

    keys: Tensor
    values: Tensor
    positions: Tensor | None = None
    valid: Tensor | None = None
    key_factor: Tensor | None = None
    value_factor: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def value_dim(self) -> int:
        return self.values.shape[-1]


Part = PackedPart | RawPart


@dataclass
class Window:
    """The newest tokens of a sequence, raw, in front of the free slots of a buffer.

    Args:
        keys: ``[batch, kv_heads, slots, key_dim]``, each head's slots side by side.
        values: ``[batch, kv_heads, slots, value_dim]`` likewise.
        tokens: Slots in use. A call's queries belong to the newest of them, and without a mask see no later one.
        valid: False for padding, bool ``[batch, slots]``; None without any.
    """

    keys: Tensor
    values: Tensor
    tokens: int
    valid: Tensor | None = None

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def value_dim(self) -> int:
        return self.values.shape[-1]


class PartTable(tuple[Part, ...]):
    """Parts that stay the same over many calls; a back end keeps in `kept` what it works out from them once."""

    kept: dict[str, Any]

    def __new__(cls, parts: Iterable[Part] = ()) -> PartTable:
        table = super().__new__(cls, (part for part in parts if part.tokens))
        table.kept = {}
        return table

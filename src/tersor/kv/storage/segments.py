"""Segments: runs of consecutive tokens, encoded once and never touched again.

A segment keeps its tokens in groups of one bit width each. Attention over a set of (key, value) pairs does
not depend on their order, and cached keys carry their rotary position already, so the tokens of a group lie
side by side in their own order and are not scattered back; `positions` remembers where each came from.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tersor.lowbit.codes import AffineCodes
from tersor.lowbit.kernels.packed_attention import PackedPart, Part, RawPart


@dataclass
class TokenGroup:
    """Tokens of one bit width.

    Args:
        keys: Packed, or ``[batch, kv_heads, n, head_dim]`` in model precision.
        values: Likewise.
        positions: Places in the sequence, int32 ``[batch, scopes, n]``.
        valid: False for empty slots, bool like ``positions``; None without any.
    """

    keys: AffineCodes | Tensor
    values: AffineCodes | Tensor
    positions: Tensor
    valid: Tensor | None

    def part(self, channel_scale: Tensor | None) -> Part:
        """This group as the attention kernel reads it; ``channel_scale`` is that of the segment."""
        if isinstance(self.keys, AffineCodes) and isinstance(self.values, AffineCodes):
            assert channel_scale is not None  # every packed segment has one
            return PackedPart(self.keys, self.values, channel_scale, self.positions, self.valid)
        assert isinstance(self.keys, Tensor) and isinstance(self.values, Tensor)
        return RawPart(self.keys, self.values, self.positions, self.valid)

    def decode(self, channel_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the group, in group order and in the precision that decoding computes in."""
        if isinstance(self.keys, AffineCodes) and isinstance(self.values, AffineCodes):
            assert channel_scale is not None
            return self.keys.decode(), self.values.decode() * channel_scale
        assert isinstance(self.keys, Tensor) and isinstance(self.values, Tensor)
        return self.keys, self.values

    def scatter_into(self, decoded: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, present: Tensor) -> None:
        """Write the group's ``decoded`` keys and values to their positions; see `Segment.scatter_into`."""
        sink = keys.shape[2] - 1
        position = self.positions.long()
        if self.valid is not None:
            position = position.masked_fill(~self.valid, sink)
        index = position.expand(-1, keys.shape[1], -1)
        for target, tokens in zip((keys, values), decoded, strict=True):
            target.scatter_(2, index[..., None].expand(-1, -1, -1, tokens.shape[-1]), tokens.to(target.dtype))
        present.scatter_(2, index, True)

    def before(self, limit: int) -> TokenGroup | None:
        """The tokens at positions below ``limit`` (parameters unchanged), or None where nothing is left."""
        keep = self.positions < limit
        if self.valid is not None:
            keep = keep & self.valid
        # Positions ascend and empty slots come last, so the tokens to keep are a prefix of every row.
        count = int(keep.sum(-1).max()) if keep.numel() else 0
        if count == 0:
            return None
        valid = keep[..., :count]
        return TokenGroup(
            _first_tokens(self.keys, count),
            _first_tokens(self.values, count),
            self.positions[..., :count].clone(),
            None if bool(valid.all()) else valid.clone(),
        )


def _first_tokens(stored: AffineCodes | Tensor, count: int) -> AffineCodes | Tensor:
    """The first ``count`` tokens in storage of their own, so that the rest is freed."""
    if isinstance(stored, Tensor):
        return stored[..., :count, :].clone()
    per_token = stored.step.shape[-2] != 1 or stored.codes.shape[-2] == 1
    shorten = (lambda x: x[..., :count, :].clone()) if per_token else (lambda x: x)
    return AffineCodes(
        stored.codes[..., :count, :].clone(),
        shorten(stored.minimum),
        shorten(stored.step),
        stored.bits,
        stored.dim,
    )


@dataclass
class Segment:
    """Tokens ``start .. start + length`` of the sequence in token groups that share one channel scale.

    Tokens that are in no group (padding, evicted ones) are gone: attention never sees them.

    Args:
        groups: The tokens by bit width.
        channel_scale: Scale of the value channels, ``[batch, kv_heads, 1, value_dim]``; None where every group is raw.
        start: Position of the first token.
        length: Number of tokens.
    """

    groups: list[TokenGroup]
    channel_scale: Tensor | None
    start: int
    length: int

    def parts(self) -> list[Part]:
        """The groups as the attention kernel reads them."""
        return [group.part(self.channel_scale) for group in self.groups]

    def scatter_into(self, keys: Tensor, values: Tensor, present: Tensor) -> None:
        """Write decoded tokens to ``keys``/``values`` ``[batch, kv_heads, sequence + 1, dim]`` at their positions.

        The column behind the last position swallows empty slots. ``present``, bool ``[batch, kv_heads,
        sequence + 1]``, becomes True where a token was written.
        """
        for group in self.groups:
            group.scatter_into(group.decode(self.channel_scale), keys, values, present)

    def before(self, limit: int) -> Segment | None:
        """The part of the segment below position ``limit``, or None where nothing is left."""
        if limit <= self.start:
            return None
        if limit >= self.start + self.length:
            return self
        groups = [group for group in (group.before(limit) for group in self.groups) if group is not None]
        return Segment(groups, self.channel_scale, self.start, limit - self.start)

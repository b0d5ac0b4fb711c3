"""A run of tokens that two neighbouring layers store together (MiniCache, arXiv 2405.14366).

The directions become a `Segment` like any other, encoded once by the method's storage, and every layer keeps its
lengths of them, which the attention kernel multiplies in. Tokens whose directions differ too much stay apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from tersor.kv.depth.merging import Granularity, MergedPair, MergeRule, as_units, restore
from tersor.kv.engine.choices import Choices
from tersor.kv.selection.base import Waiting
from tersor.kv.storage.segments import Segment, TokenGroup
from tersor.lowbit.codes import compute_dtype
from tersor.lowbit.kernels.packed_attention import Part


@dataclass
class MergeStatistics:
    """Counts and sums of what was merged, as it was then.

    Args:
        tokens: Tokens, without padding.
        retained: Those that stayed apart.
        units: Vectors compared, keys and values of all tokens.
        angle: Sum of their angles in radians.
        cosine: Sum of the cosines.
        merged: Vectors that were merged.
        error: Sum of their predicted relative errors.
    """

    tokens: int = 0
    retained: int = 0
    units: int = 0
    angle: float = 0.0
    cosine: float = 0.0
    merged: int = 0
    error: float = 0.0

    def plus(self, other: MergeStatistics) -> MergeStatistics:
        return MergeStatistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def row(self) -> dict[str, float]:
        """Mean angle in radians, mean cosine, share of tokens retained, predicted relative error of the others."""
        return {
            "mean_angle": self.angle / max(self.units, 1),
            "mean_cosine": self.cosine / max(self.units, 1),
            "retained": self.retained / max(self.tokens, 1),
            "predicted_error": self.error / max(self.merged, 1),
        }


@dataclass
class MergedGroup:
    """Directions of one bit width, and the lengths that turn them into keys and values of either layer.

    Lengths are over the length of the *stored* direction, so that rounding a direction does not change them.

    Args:
        directions: What both layers share.
        key_lengths: In the first and in the second layer, ``[batch, scopes, n]`` in the order of the group.
        value_lengths: Likewise.
    """

    directions: TokenGroup
    key_lengths: list[Tensor]
    value_lengths: list[Tensor]

    def before(self, limit: int) -> MergedGroup | None:
        kept = self.directions.before(limit)
        if kept is None:
            return None
        count = kept.positions.shape[-1]
        keys, values = ([x[..., :count].clone() for x in lengths] for lengths in (self.key_lengths, self.value_lengths))
        return MergedGroup(kept, keys, values)


@dataclass
class MergedSegment:
    """Tokens ``start .. start + length`` of two layers.

    Args:
        groups: The shared directions by bit width, with lengths.
        channel_scale: Scale of the value directions, as in `Segment`.
        apart: The tokens that were not merged, of the first and of the second layer.
        start: Position of the first token.
        length: Number of tokens.
        statistics: How similar the layers were.
    """

    groups: list[MergedGroup]
    channel_scale: Tensor | None
    apart: list[Segment]
    start: int
    length: int
    statistics: MergeStatistics

    def before(self, limit: int) -> MergedSegment | None:
        """The part below position ``limit``, or None where nothing is left; see `Segment.before`."""
        if limit <= self.start:
            return None
        if limit >= self.start + self.length:
            return self
        groups = [group for group in (group.before(limit) for group in self.groups) if group is not None]
        # They begin where this segment does, so either layer keeps one, empty or not.
        apart = [part for part in (part.before(limit) for part in self.apart) if part is not None]
        return replace(self, groups=groups, apart=apart, length=limit - self.start)


@dataclass
class LayerView:
    """A merged segment as one of its layers reads it (``side`` 0 or 1); stands where others have a `Segment`."""

    merged: MergedSegment
    side: int

    @property
    def start(self) -> int:
        return self.merged.start

    @property
    def length(self) -> int:
        return self.merged.length

    @property
    def groups(self) -> list[TokenGroup]:
        """What the layer reads: shared directions, then its own tokens."""
        return [*(group.directions for group in self.merged.groups), *self.merged.apart[self.side].groups]

    def parts(self) -> list[Part]:
        """What the layer reads, as the attention kernel does; see `Segment.parts`."""
        shared = [
            replace(
                group.directions.part(self.merged.channel_scale),
                key_factor=group.key_lengths[self.side],
                value_factor=group.value_lengths[self.side],
            )
            for group in self.merged.groups
        ]
        return shared + self.merged.apart[self.side].parts()

    def scatter_into(self, keys: Tensor, values: Tensor, present: Tensor) -> None:
        """Write restored tokens to their positions; see `Segment.scatter_into`."""
        for group in self.merged.groups:
            directions = group.directions.decode(self.merged.channel_scale)
            lengths = group.key_lengths[self.side], group.value_lengths[self.side]
            wide = compute_dtype(keys.dtype)
            restored = [restore(x.to(wide), m.to(wide)) for x, m in zip(directions, lengths, strict=True)]
            group.directions.scatter_into((restored[0], restored[1]), keys, values, present)
        self.merged.apart[self.side].scatter_into(keys, values, present)


def encode_pair(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    waiting: Waiting,
    choices: Choices,
    rule: MergeRule,
    *,
    start: int,
    param_dtype: torch.dtype,
) -> MergedSegment:
    """Merge the oldest waiting tokens of two layers.

    One set of tokens stays apart for keys and values of all heads, by the largest distance among them: attention
    reads the key and the value of a token from the same place. The selection ranks the merged tokens only.

    Args:
        keys: Keys of either layer, ``[batch, kv_heads, tokens, head_dim]``.
        values: Values likewise.
        waiting: The tokens as the selection sees them, with the scores of both layers.
        choices: How to choose and to store.
        rule: How to merge.
        start: Position of the first token.
        param_dtype: Storage precision of parameters and lengths; see `Storage.precision`.
    """
    where = f"layers {waiting.layer} and {waiting.layer + 1}"
    pairs, valid = [rule.pair(*keys), rule.pair(*values)], waiting.valid
    apart = rule.apart(pairs, valid)
    together = ~apart if valid is None else valid & ~apart
    statistics = _statistics(pairs, valid, together)

    rank_keys = restore(pairs[0].directions, (pairs[0].lengths[0] + pairs[0].lengths[1]) / 2)
    mergeable = None if bool(together.all()) else together
    chosen = choices.selection.choose(replace(waiting, keys=rank_keys, valid=mergeable, count_slots=True))
    key_directions, value_directions = (pair.directions.to(keys[0].dtype) for pair in pairs)
    encode = partial(choices.storage.encode, start=start, where=where, param_dtype=param_dtype)
    shared = encode(key_directions, value_directions, chosen)
    groups = [_with_lengths(group, shared, pairs, rule.granularity, param_dtype) for group in shared.groups]

    own = replace(waiting, valid=apart, count_slots=True).all_important()
    kept = [encode(k, v, own) for k, v in zip(keys, values, strict=True)]
    return MergedSegment(groups, shared.channel_scale, kept, start, keys[0].shape[2], statistics)


def _with_lengths(
    group: TokenGroup, shared: Segment, pairs: Sequence[MergedPair], granularity: Granularity, dtype: torch.dtype
) -> MergedGroup:
    """A group of ``shared`` with the lengths that its stored directions need in either layer."""
    index = group.positions.long() - shared.start
    lengths = []
    for pair, decoded in zip(pairs, group.decode(shared.channel_scale), strict=True):
        norm = as_units(decoded, granularity).norm(dim=-1)
        scopes = max(norm.shape[1], index.shape[1])
        picked = index.expand(-1, scopes, -1)
        own = [m.expand(-1, scopes, -1).gather(-1, picked) / torch.where(norm == 0, 1.0, norm) for m in pair.lengths]
        if group.valid is not None:
            # An empty slot has weight 0, which only a finite length leaves at 0.
            own = [m.masked_fill(~group.valid, 0.0) for m in own]
        lengths.append([m.to(dtype) for m in own])
    return MergedGroup(group, *lengths)


def _statistics(pairs: Sequence[MergedPair], valid: Tensor | None, together: Tensor) -> MergeStatistics:
    counted = torch.ones_like(together) if valid is None else valid
    tokens = int(counted.sum())
    total = MergeStatistics(tokens=tokens, retained=tokens - int(together.sum()))
    for pair in pairs:
        omega = pair.distance[counted[:, None].expand_as(pair.distance)] * torch.pi
        errors = [error[together[:, None].expand_as(error)] for error in pair.errors]
        total = total.plus(
            MergeStatistics(
                units=omega.numel(),
                angle=float(omega.sum()),
                cosine=float(omega.cos().sum()),
                merged=errors[0].numel(),
                error=float((errors[0] + errors[1]).sum() / 2),
            )
        )
    return total

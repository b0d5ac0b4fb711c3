"""Two neighbouring cache layers that share one set of directions (MiniCache, arXiv 2405.14366).

Both layers keep raw buffers of their own. When the later layer of a pair has seen a step, what is due is merged for
both: the directions become a `Segment` like any other, encoded once by the method's storage, and every layer keeps
its lengths of them, which the attention kernel multiplies in. Tokens whose directions differ too much stay apart.

The first layer of a pair owns what they share: operations on the cache, which reach every layer in turn, are done
there once, and the second layer sees the result.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tersor.bench.measure import storage_bytes
from tersor.kv.depth.merging import MergedPair, as_units, merge_pair, restore, retained
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.engine.tree import map_tensors
from tersor.kv.selection.probes import ProbeScores
from tersor.kv.selection.ratio import Waiting
from tersor.kv.storage.segments import Segment, TokenGroup, everything, nothing
from tersor.lowbit.codes import compute_dtype, storage_dtype
from tersor.lowbit.kernels.packed_attention import Part

if TYPE_CHECKING:
    from tersor.kv.depth.base import MergedPairs
    from tersor.kv.method import KVMethod


@dataclass
class MergeStatistics:
    """Counts and sums of what was merged, as it was then: ``angle`` and ``cosine`` over the ``units`` of all tokens
    and both kinds, ``error`` over the ``merged`` units that were not retained.
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

    ``key_lengths``, ``value_lengths``: of the first and of the second layer, ``[batch, scopes, n]`` in the order of
    the group, over the length of the *stored* direction, so that rounding a direction does not change lengths.
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

    ``groups`` and ``channel_scale``: the shared directions, as in `Segment`. ``apart``: of either layer, the tokens
    that were not merged.
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

    def parts(self, attention_mask: Tensor | None, score_bias: None = None) -> list[Part]:
        shared = [
            replace(
                group.directions.part(self.merged.channel_scale, attention_mask),
                key_factor=group.key_lengths[self.side],
                value_factor=group.value_lengths[self.side],
            )
            for group in self.merged.groups
        ]
        return shared + self.merged.apart[self.side].parts(attention_mask)

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
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    valid: Tensor | None,
    scores: ProbeScores,
    method: KVMethod,
    *,
    start: int,
    layer: int,
    segment: int,
) -> MergedSegment:
    """Merge the tokens ``[batch, kv_heads, tokens, head_dim]`` of layers ``layer`` and ``layer + 1``.

    One set of tokens stays apart for keys and values of all heads, by the largest distance among them: attention
    reads the key and the value of a token from the same place. ``valid``: bool ``[batch, tokens]``, None without
    padding. The selection ranks the merged tokens only, by the ``scores`` of both layers together.
    """
    depth: MergedPairs = method.depth  # type: ignore[assignment]
    where = f"layers {layer} and {layer + 1}"
    pairs = [merge_pair(*x, t=depth.t, granularity=depth.granularity, merge=depth.merge) for x in (keys, values)]
    apart = tokens_apart(pairs, valid, depth)
    together = ~apart if valid is None else valid & ~apart
    statistics = _statistics(pairs, valid, together)

    batch, _, tokens, _ = keys[0].shape
    rank_keys = restore(pairs[0].directions, (pairs[0].lengths[0] + pairs[0].lengths[1]) / 2)
    mergeable = None if bool(together.all()) else together
    chosen = method.selection.choose(Waiting(rank_keys, mergeable, scores, layer, segment))
    key_directions, value_directions = (pair.directions.to(keys[0].dtype) for pair in pairs)
    shared = method.storage.encode(key_directions, value_directions, chosen, start=start, where=where)
    dtype = getattr(torch, method.storage.param_dtype)
    groups = [_with_lengths(group, shared, pairs, depth, dtype) for group in shared.groups]

    own = everything(batch, tokens, apart, apart.device), nothing(batch, apart.device)
    kept = [method.storage.encode(k, v, own, start=start, where=where) for k, v in zip(keys, values, strict=True)]
    return MergedSegment(groups, shared.channel_scale, kept, start, tokens, statistics)


def tokens_apart(pairs: Sequence[MergedPair], valid: Tensor | None, depth: MergedPairs) -> Tensor:
    """Tokens that are not merged, bool ``[batch, tokens]``: see `retained`, over all heads and kinds."""
    return retained(
        torch.stack([pair.distance.amax(1) for pair in pairs]).amax(0),
        gamma=depth.gamma,
        rule=depth.retention,
        valid=valid,
        undefined=torch.stack([pair.undefined.any(1) for pair in pairs]).any(0),
        max_fraction=depth.max_retained_fraction,
    )


def _with_lengths(
    group: TokenGroup, shared: Segment, pairs: Sequence[MergedPair], depth: MergedPairs, dtype: torch.dtype
) -> MergedGroup:
    index = group.positions.long() - shared.start
    lengths = []
    for pair, decoded in zip(pairs, group.decode(shared.channel_scale), strict=True):
        norm = as_units(decoded, depth.granularity).norm(dim=-1)
        scopes = max(norm.shape[1], index.shape[1])
        picked = index.expand(-1, scopes, -1)
        own = [m.expand(-1, scopes, -1).gather(-1, picked) / torch.where(norm == 0, 1.0, norm) for m in pair.lengths]
        if group.valid is not None:
            # An empty slot has weight 0, which only a finite length leaves at 0.
            own = [m.masked_fill(~group.valid, 0.0) for m in own]
        lengths.append([m.to(storage_dtype(dtype, m.max())) for m in own])
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


class SimilarityGuard:
    """Says once, when every pair of a cache has merged its first segment, if merging costs too much.

    Warns above ``max_relative_error``; raises `ValueError` instead if ``strict``.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], max_relative_error: float, strict: bool):
        self.expected = set(pairs)
        self.max_relative_error = max_relative_error
        self.strict = strict
        self.rows: dict[tuple[int, int], dict[str, float]] = {}

    def note(self, pair: tuple[int, int], row: dict[str, float] | None) -> None:
        """Take the first figures of ``pair``, or None if it is not merged after all."""
        if pair not in self.expected:
            return
        self.expected.discard(pair)
        if row is not None:
            self.rows[pair] = row
        if not self.expected:
            self._judge()

    def _judge(self) -> None:
        worst = max((row["predicted_error"] for row in self.rows.values()), default=0.0)
        if worst <= self.max_relative_error:
            return
        message = (
            f"merging changes keys and values by up to {worst:.0%} of their length, more than "
            f"max_relative_error={self.max_relative_error}; pair fewer or other layers "
            "(MiniCache.auto(model, input_ids) picks them)\n" + pair_table(self.rows)
        )
        if self.strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)


def pair_table(rows: dict[tuple[int, int], dict[str, float]]) -> str:
    """One line for each pair of layers, for messages."""
    lines = ["layers  mean cosine  retained  predicted error"]
    for pair, row in sorted(rows.items()):
        name = f"{pair[0]}, {pair[1]}"
        figures = f"{row['mean_cosine']:>11.3f}{row['retained']:>10.1%}{row['predicted_error']:>17.3f}"
        lines.append(f"{name:<8}{figures}")
    return "\n".join(lines)


class PairedLayer(CompressedLayer):
    """One of two neighbouring layers that are merged; without a ``mate`` it is a plain `CompressedLayer`."""

    segments: list[Any]

    def __init__(self, method: KVMethod, layer_idx: int, guard: SimilarityGuard):
        super().__init__(method, layer_idx)
        self.guard = guard
        self.mate: PairedLayer | None = None

    @classmethod
    def pair(cls, method: KVMethod, first: int, guard: SimilarityGuard) -> tuple[PairedLayer, PairedLayer]:
        """Empty layers for the model's layers ``first`` and ``first + 1``."""
        layers = cls(method, first, guard), cls(method, first + 1, guard)
        layers[0].mate, layers[1].mate = layers[1], layers[0]
        return layers

    @property
    def is_first(self) -> bool:
        return self.mate is not None and self.layer_idx < self.mate.layer_idx

    @property
    def both(self) -> tuple[PairedLayer, PairedLayer]:
        """First and second layer of the pair."""
        assert self.mate is not None
        return (self, self.mate) if self.is_first else (self.mate, self)

    @property
    def merged(self) -> list[MergedSegment]:
        """What the pair shares."""
        return [] if self.mate is None else [view.merged for view in self.segments]

    def _share(self, segments: list[MergedSegment]) -> None:
        for side, layer in enumerate(self.both):
            layer.segments = [LayerView(segment, side) for segment in segments]

    def pair_row(self) -> dict[str, Any]:
        """Figures of the pair for `CompressedCache.summary`: similarity when merged, and bytes by use."""
        total = MergeStatistics()
        for segment in self.merged:
            total = total.plus(segment.statistics)
        groups = [group for segment in self.merged for group in segment.groups]
        directions = [(group.directions.keys, group.directions.values, group.directions.valid) for group in groups]
        apart = [segment.apart for segment in self.merged]
        positions = [group.directions.positions for group in groups]
        waiting = [[getattr(layer, name) for name in layer.owned_fields if name != "segments"] for layer in self.both]
        return {
            "layers": [layer.layer_idx for layer in self.both],
            **total.row(),
            "bytes": {
                "directions": storage_bytes([directions, [segment.channel_scale for segment in self.merged]]),
                "lengths": storage_bytes([(group.key_lengths, group.value_lengths) for group in groups]),
                "positions": storage_bytes(positions),
                "retained": storage_bytes(apart),
                "waiting": storage_bytes(waiting),
            },
        }

    # -- what the layer and its mate do once -----------------------------------------------------------------

    @property
    def owned_fields(self) -> tuple[str, ...]:
        """The first layer of a pair owns what both share."""
        fields = super().owned_fields
        return fields if self.mate is None or self.is_first else tuple(f for f in fields if f != "segments")

    def reset(self) -> None:
        super().reset()
        if self.is_first:
            self._share([])

    def _map_segments(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.mate is None:
            super()._map_segments(function)
        elif self.is_first:
            self._share(map_tensors(self.merged, function))

    def _move(self, device: torch.device | str) -> None:
        """What is shared comes back for whichever layer needs it first, and leaves with the second."""
        if self.mate is None:
            super()._move(device)
            return

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        self._map_waiting(move)
        if device != "cpu" or not self.is_first:
            self._share(map_tensors(self.merged, move))

    def _crop_segments(self, limit: int) -> None:
        if self.mate is None:
            super()._crop_segments(limit)
        elif self.is_first:
            cropped = (segment.before(limit) for segment in self.merged)
            self._share([segment for segment in cropped if segment is not None])

    # -- merging ---------------------------------------------------------------------------------------------

    def _compress_if_due(self, *, recording: bool) -> None:
        mate = self.mate
        if mate is not None:
            # Between the two updates of a step, or after a step that skipped one of the layers, both wait.
            if mate.seen != self.seen:
                return
            self._due = self._due or mate._due
            if self.seen and (reason := _difference(*self.both)):
                self._part(reason)
                mate._due = self._due
                mate._compress_if_due(recording=recording)
        super()._compress_if_due(recording=recording)

    @torch.no_grad()
    def _compress(self, tokens: int) -> None:
        """Merge the ``tokens`` oldest waiting tokens of both layers and free their raw form."""
        if self.mate is None:
            super()._compress(tokens)
            return
        here = self.keys.device  # the mate may have been offloaded
        one, other = self.both
        segment = encode_pair(
            (one.keys[:, :, :tokens].to(here), other.keys[:, :, :tokens].to(here)),
            (one.values[:, :, :tokens].to(here), other.values[:, :, :tokens].to(here)),
            None if self.valid is None else self.valid[:, :tokens],
            pooled_scores([map_tensors(layer.scores, lambda x: x.to(here)) for layer in self.both], tokens),
            self.method,
            start=self.seen - self.waiting,
            layer=one.layer_idx,
            segment=len(self.segments),
        )
        self._share([*self.merged, segment])
        for layer in self.both:
            layer._due = False
            layer._keep_waiting(tokens, layer.waiting)
        self.guard.note((one.layer_idx, other.layer_idx), segment.statistics.row())

    def _part(self, reason: str) -> None:
        first, second = self.both
        warnings.warn(
            f"layers {first.layer_idx} and {second.layer_idx} are not merged: {reason}; each is compressed for itself",
            stacklevel=2,
        )
        first.mate = second.mate = None
        self.guard.note((first.layer_idx, second.layer_idx), None)


def _difference(first: PairedLayer, second: PairedLayer) -> str | None:
    """Why two layers that hold tokens cannot share directions, None if they can."""
    if first.device != second.device:
        return f"they are on {first.device} and {second.device}"
    shapes = [(layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1]) for layer in (first, second)]
    if shapes[0] != shapes[1]:
        return f"their (KV heads, key, value dimensions) are {shapes[0]} and {shapes[1]}"
    return None


def pooled_scores(scores: Sequence[ProbeScores], tokens: int) -> ProbeScores:
    """Attention that the ``tokens`` oldest waiting tokens got in both layers, over the probe rows of both."""
    totals = [total for each in scores if (total := each.keep_columns(0, tokens).totals(tokens)) is not None]
    if not totals:
        return ProbeScores()
    sums, counts = zip(*totals, strict=True)
    return ProbeScores(torch.stack(sums).sum(0), torch.stack(counts).sum(0))

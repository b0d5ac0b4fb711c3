"""Two neighbouring cache layers that share one set of directions (MiniCache, arXiv 2405.14366).

Both layers keep raw buffers of their own. When the later layer of a pair has seen a step, what is due is merged for
both (`tersor.kv.depth.merged_segment`).

The first layer of a pair owns what they share: operations on the cache, which reach every layer in turn, are done
there once, and the second layer sees the result.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from tersor._errors import TersorError
from tersor.bench.measure import storage_bytes
from tersor.kv.depth.guard import Pair, SimilarityGuard
from tersor.kv.depth.merged_segment import LayerView, MergedGroup, MergedSegment, MergeStatistics, encode_pair
from tersor.kv.depth.merging import Granularity, Merge, MergeRule, Retention
from tersor.kv.depth.pairing import choose_pairs
from tersor.kv.engine.choices import Choices, pick
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.engine.tree import map_tensors
from tersor.kv.selection.probes import ProbeScores


@dataclass(frozen=True, kw_only=True)
class MergedPairs:
    """Disjoint pairs of neighbouring layers share directions (MiniCache); all others keep their own tokens.

    Args:
        start_layer: First layer that may be paired, an index or a share of all layers.
        pairs: The pairs themselves, instead of that.
        t: See `MergeRule`, as for the next five; the rule applies to every segment by itself.
        gamma: See `MergeRule`.
        retention: See `MergeRule`.
        granularity: See `MergeRule`.
        merge: See `MergeRule`.
        max_retained_fraction: See `MergeRule`.
        max_relative_error: Warn if merging moves keys and values by a larger share of their length.
        strict: Raise `ValueError` then, instead of warning.
    """

    start_layer: int | float = 0.5
    pairs: tuple[Pair, ...] | None = None
    t: float = 0.6
    gamma: float = 0.05
    retention: Retention = "range"
    granularity: Granularity = "head"
    merge: Merge = "slerp"
    max_retained_fraction: float = 0.1
    max_relative_error: float = 0.35
    strict: bool = False

    @property
    def rule(self) -> MergeRule:
        """How two layers are merged."""
        return pick(MergeRule, self)

    def check(self, choices: Choices) -> None:
        if choices.storage.subtract_key_bias:
            raise TersorError(
                "subtract_key_bias does not go with merged layers: the two layers of a pair have different biases; "
                "use one of the two"
            )
        if choices.selection.per_head and self.granularity == "token":
            raise TersorError(
                "granularity='token' keeps one length for all heads of a token, but the selection lets every head pick "
                "its own tokens; use granularity='head', or one choice of tokens a layer"
            )
        if choices.prefill.sparse and choices.storage.evicts:
            raise TersorError(
                "a sparse prefill that evicts does not go with merged layers: each layer keeps tokens of its own "
                "choice, and a merged pair stores one set for both; use policy='quantize' or 'keep'"
            )

    def build(self, choices: Choices, layers: list[int], config: PreTrainedConfig) -> dict[int, CompressedLayer]:
        """Layers in pairs, and plain ones for the rest.

        Raises:
            ValueError: If no two layers can be paired, or if ``pairs`` names some that cannot.
        """
        pairs = choose_pairs(layers, config, start_layer=self.start_layer, pairs=self.pairs)
        guard = SimilarityGuard(pairs, self.max_relative_error, self.strict)
        built = {index: CompressedLayer(choices, index) for index in layers}
        for first, second in pairs:
            built[first], built[second] = PairedLayer.pair(choices, self.rule, first, guard)
        return built


class PairedLayer(CompressedLayer):
    """One of two neighbouring layers that are merged; without a ``mate`` it is a plain `CompressedLayer`.

    Args:
        choices: How to choose and to store.
        layer_idx: Index of the layer in the model.
        rule: How to merge.
        guard: Told of the first figures.
    """

    def __init__(self, choices: Choices, layer_idx: int, rule: MergeRule, guard: SimilarityGuard):
        self.rule, self.guard = rule, guard
        self.mate: PairedLayer | None = None
        super().__init__(choices, layer_idx)

    @classmethod
    def pair(
        cls, choices: Choices, rule: MergeRule, first: int, guard: SimilarityGuard
    ) -> tuple[PairedLayer, PairedLayer]:
        """Empty layers for the model's layers ``first`` and ``first + 1``."""
        layers = cls(choices, first, rule, guard), cls(choices, first + 1, rule, guard)
        layers[0].mate, layers[1].mate = layers[1], layers[0]
        return layers

    @property
    def is_first(self) -> bool:
        """Whether this is the earlier layer of a pair."""
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

    def summary(self) -> dict[str, Any] | None:
        """Figures of the pair, told by its first layer: similarity when merged, and bytes by use."""
        if not self.is_first:
            return None
        total = MergeStatistics()
        for segment in self.merged:
            total = total.plus(segment.statistics)
        groups = [group for segment in self.merged for group in segment.groups]
        directions = [(group.directions.keys, group.directions.values, group.directions.valid) for group in groups]
        waiting = [[node for name, node in layer.owned().items() if name != "segments"] for layer in self.both]
        return {
            "layers": [layer.layer_idx for layer in self.both],
            **total.row(),
            "bytes": {
                "directions": storage_bytes([directions, [segment.channel_scale for segment in self.merged]]),
                "lengths": storage_bytes([(group.key_lengths, group.value_lengths) for group in groups]),
                "positions": storage_bytes([group.directions.positions for group in groups]),
                "retained": storage_bytes([segment.apart for segment in self.merged]),
                "waiting": storage_bytes(waiting),
            },
        }

    # -- files -----------------------------------------------------------------------------------------------

    NODES = (*CompressedLayer.NODES, MergedSegment, MergedGroup, MergeStatistics)

    def state(self) -> dict[str, Any]:
        """What the pair shares is in the state of its first layer."""
        state = super().state()
        if state and self.mate is not None:
            state["segments"] = self.merged if self.is_first else []
        return {**state, "alone": self.mate is None} if state else {}

    def restore(self, state: dict[str, Any]) -> None:
        if not state:
            return
        if state["alone"] and (mate := self.mate) is not None:
            mate.mate = self.mate = None
        shared = state["segments"]
        if self.mate is not None:
            state = {**state, "segments": [LayerView(each, 0) for each in shared] if self.is_first else self.segments}
        super().restore(state)
        if self.is_first:
            self._share(shared)
            if shared:
                self.guard.expected.discard((self.layer_idx, self.layer_idx + 1))

    # -- what the layer and its mate do once -----------------------------------------------------------------

    def owned(self) -> dict[str, Any]:
        """The first layer of a pair owns what both share."""
        owned = super().owned()
        if self.mate is not None and not self.is_first:
            del owned["segments"]
        return owned

    def reset(self) -> None:
        super().reset()
        if self.is_first:
            self._share([])

    def map_segments(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.mate is None:
            super().map_segments(function)
        elif self.is_first:
            self._share(map_tensors(self.merged, function))

    def move(self, device: torch.device | str) -> None:
        """What is shared comes back for whichever layer needs it first, and leaves with the second."""
        if self.mate is None:
            super().move(device)
            return

        def moved(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        self.map_buffer(moved)
        if device != "cpu" or not self.is_first:
            self._share(map_tensors(self.merged, moved))

    def crop_segments(self, limit: int) -> None:
        if self.mate is None:
            super().crop_segments(limit)
        elif self.is_first:
            cropped = (segment.before(limit) for segment in self.merged)
            self._share([segment for segment in cropped if segment is not None])

    # -- merging ---------------------------------------------------------------------------------------------

    def compress_if_due(self) -> None:
        mate = self.mate
        if mate is not None:
            # Between the two updates of a step, or after a step that skipped one of the layers, both wait.
            if mate.seen != self.seen:
                return
            self.due = self.due or mate.due
            if self.seen and (reason := _difference(*self.both)):
                self._part(reason)
                mate.due = self.due
                mate.compress_if_due()
        super().compress_if_due()

    @torch.no_grad()
    def compress(self, tokens: int) -> None:
        """Merge the ``tokens`` oldest waiting tokens of both layers and free their raw form."""
        if self.mate is None:
            super().compress(tokens)
            return
        one, other = self.both
        here = self.keys.device  # the mate may have been offloaded
        waiting = replace(
            self.buffer.oldest(tokens, len(self.segments)),
            scores=pooled_scores(
                [map_tensors(layer.buffer.scores, lambda x: x.to(here)) for layer in self.both], tokens
            ),
            layer=one.layer_idx,
        )
        keys = [layer.keys[:, :, :tokens].to(here) for layer in self.both]
        values = [layer.values[:, :, :tokens].to(here) for layer in self.both]
        one.param_dtype = one.param_dtype or self.choices.storage.precision(*keys, *values)
        segment = encode_pair(
            keys,
            values,
            waiting,
            self.choices,
            self.rule,
            start=self.seen - self.waiting,
            param_dtype=one.param_dtype,
        )
        self._share([*self.merged, segment])
        for layer in self.both:
            layer.due = False
            layer.buffer.keep(tokens, layer.waiting, self.choices.window)
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
    held = [layer.buffer.slots for layer in (first, second)]
    shapes = [(slots[0].shape[1], slots[0].shape[-1], slots[1].shape[-1]) for slots in held if slots is not None]
    if shapes[0] != shapes[1]:
        return f"their (KV heads, key, value dimensions) are {shapes[0]} and {shapes[1]}"
    return None


def pooled_scores(scores: Sequence[ProbeScores], tokens: int) -> ProbeScores:
    """Attention that the ``tokens`` oldest waiting tokens got in both layers, over the probe rows of both."""
    totals = [total for each in scores if (total := each.totals(tokens)) is not None]
    if not totals:
        return ProbeScores()
    sums, counts = zip(*totals, strict=True)
    return ProbeScores(torch.stack(sums).sum(0), torch.stack(counts).sum(0))

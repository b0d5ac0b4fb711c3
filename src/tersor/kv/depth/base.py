"""Depth: how the cache layers of a model relate to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from transformers.cache_utils import get_layer_types_and_kwargs

from tersor.kv.depth.merged_segment import PairedLayer, SimilarityGuard
from tersor.kv.engine.layer import CompressedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from tersor.kv.depth.merging import Granularity, Merge, Retention
    from tersor.kv.method import KVMethod


class Depth(Protocol):
    """What the engine asks of a depth; a frozen dataclass that holds no tensors."""

    def build(self, method: KVMethod, layer_indices: list[int], config: PreTrainedConfig) -> dict[int, CompressedLayer]:
        """One cache layer for each of the model's layers that tersor compresses; ``config`` of the text decoder."""


@dataclass(frozen=True)
class SeparateLayers:
    """Every layer keeps its own tokens."""

    def build(self, method: KVMethod, layer_indices: list[int], config: PreTrainedConfig) -> dict[int, CompressedLayer]:
        return {index: CompressedLayer(method, index) for index in layer_indices}


@dataclass(frozen=True, kw_only=True)
class MergedPairs:
    """Disjoint pairs of neighbouring layers share directions (MiniCache); all others keep their own tokens.

    ``start_layer``: first layer that may be paired, an index or a share of all layers. ``pairs``: instead of that, the
    pairs themselves. ``t``: 0 keeps the earlier layer's directions, 1 the later one's. ``gamma``, ``retention``,
    ``max_retained_fraction``: tokens that are not merged, see `tersor.kv.depth.merging.retained`; the rule applies to
    every segment by itself. ``granularity``: one length a "head", or a "token". ``merge``: "slerp", or "mean" to
    compare with. ``max_relative_error``: warn above it, or raise if ``strict``.
    """

    start_layer: int | float = 0.5
    pairs: tuple[tuple[int, int], ...] | None = None
    t: float = 0.6
    gamma: float = 0.05
    retention: Retention = "range"
    granularity: Granularity = "head"
    merge: Merge = "slerp"
    max_retained_fraction: float = 0.1
    max_relative_error: float = 0.35
    strict: bool = False

    def check(self, method: KVMethod) -> None:
        """Raise `ValueError` if the method has something that does not go with merged layers."""
        if method.storage.subtract_key_bias:
            raise ValueError(
                "subtract_key_bias does not go with merged layers: the two layers of a pair have different biases; "
                "use one of the two"
            )
        if method.selection.per_head and self.granularity == "token":
            raise ValueError(
                "granularity='token' keeps one length for all heads of a token, but the selection lets every head pick "
                "its own tokens; use granularity='head', or one choice of tokens a layer"
            )

    def build(self, method: KVMethod, layer_indices: list[int], config: PreTrainedConfig) -> dict[int, CompressedLayer]:
        """Layers in pairs, and plain ones for the rest.

        Raises:
            ValueError: where no two layers can be paired, or where ``pairs`` names some that cannot.
        """
        self.check(method)
        pairs = choose_pairs(layer_indices, config, self)
        guard = SimilarityGuard(pairs, self.max_relative_error, self.strict)
        layers = {index: CompressedLayer(method, index) for index in layer_indices}
        for first, second in pairs:
            layers[first], layers[second] = PairedLayer.pair(method, first, guard)
        return layers


def choose_pairs(layers: list[int], config: PreTrainedConfig, depth: MergedPairs) -> list[tuple[int, int]]:
    """The pairs that ``depth`` makes of ``layers``; raises `ValueError` as `MergedPairs.build` does."""
    count = len(layer_types(config))
    if depth.pairs is not None:
        return _checked(list(depth.pairs), layers, config)
    start = depth.start_layer if isinstance(depth.start_layer, int) else int(depth.start_layer * count)
    pairs: list[tuple[int, int]] = []
    free = start
    for first in range(start, count - 1):
        if first >= free and not why_not(first, first + 1, layers, config):
            pairs.append((first, first + 1))
            free = first + 2
    if not pairs:
        reasons = [f"{i} and {i + 1}: {why_not(i, i + 1, layers, config)}" for i in range(start, count - 1)]
        raise ValueError(
            f"no two neighbouring layers can be merged from layer {start} of {count} on "
            f"({'; '.join(reasons) or 'there are fewer than two'}); the layers are {layer_types(config)}. "
            "Use a smaller start_layer, or a method that does not merge layers"
        )
    return pairs


def _checked(pairs: list[tuple[int, int]], layers: list[int], config: PreTrainedConfig) -> list[tuple[int, int]]:
    used: set[int] = set()
    for first, second in pairs:
        reason = why_not(first, second, layers, config)
        if used & {first, second}:
            reason = "one of them is in another pair already"
        if reason:
            raise ValueError(f"pairs={tuple(pairs)}: layers {first} and {second} cannot be merged: {reason}")
        used |= {first, second}
    return pairs


def why_not(first: int, second: int, layers: list[int], config: PreTrainedConfig) -> str | None:
    """Why two layers cannot share directions, None if they can."""
    types = layer_types(config)
    if second != first + 1 or first < 0 or second >= len(types):
        return f"only layer i and layer i + 1 can be, among layers 0 to {len(types) - 1}"
    for index in (first, second):
        if index not in layers:
            whole = types[index] == "full_attention"
            return f"layer {index} is " + ("skipped or shares its cache" if whole else types[index])
    mine, theirs = [_traits(config, index) for index in (first, second)]
    differing = [name for name in mine if mine[name] != theirs[name]]
    if differing:
        return f"they differ in {', '.join(differing)}"
    return None


def layer_types(config: PreTrainedConfig) -> list[str]:
    """The library's name for what each layer caches."""
    types: list[str] = get_layer_types_and_kwargs(config)[0]
    return types


def _traits(config: PreTrainedConfig, index: int) -> dict[str, object]:
    """What must be equal for two layers' keys and values to be comparable: shape and rotation."""
    own = config.per_layer_config[index]
    names = ("num_key_value_heads", "head_dim", "v_head_dim", "rope_parameters", "partial_rotary_factor")
    traits: dict[str, object] = {name: getattr(own, name, None) for name in names}
    rotated = getattr(config, "no_rope_layers", None)  # 1 for layers that rotate, whatever the name says
    traits["rotary positions"] = rotated[index] if rotated else None
    return traits

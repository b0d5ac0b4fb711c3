"""Which neighbouring layers of a model can share directions."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig

from tersor._errors import TersorError
from tersor.kv.depth.guard import Pair
from tersor.kv.engine.cache import layer_types


def choose_pairs(
    layers: list[int], config: PreTrainedConfig, *, start_layer: int | float, pairs: Sequence[Pair] | None = None
) -> list[Pair]:
    """Disjoint pairs of neighbouring layers.

    Args:
        layers: Layers that are compressed.
        config: Configuration of the text decoder.
        start_layer: First layer that may be paired, an index or a share of all layers.
        pairs: The pairs themselves, instead of that.

    Raises:
        ValueError: If no two layers can be paired, or if ``pairs`` names some that cannot.
    """
    if pairs is not None:
        return _checked(pairs, layers, config)
    types = layer_types(config)
    count = len(types)
    start = start_layer if isinstance(start_layer, int) else int(start_layer * count)
    found: list[Pair] = []
    free = start
    for first in range(start, count - 1):
        if first >= free and not unpairable_reason(first, first + 1, layers, config):
            found.append((first, first + 1))
            free = first + 2
    if not found:
        reasons = [f"{i} and {i + 1}: {unpairable_reason(i, i + 1, layers, config)}" for i in range(start, count - 1)]
        raise TersorError(
            f"no two neighbouring layers can be merged from layer {start} of {count} on "
            f"({'; '.join(reasons) or 'there are fewer than two'}); the layers are {types}. "
            "Use a smaller start_layer, or a method that does not merge layers"
        )
    return found


def _checked(pairs: Sequence[Pair], layers: list[int], config: PreTrainedConfig) -> list[Pair]:
    used: set[int] = set()
    for first, second in pairs:
        reason = unpairable_reason(first, second, layers, config)
        if used & {first, second}:
            reason = "one of them is in another pair already"
        if reason:
            raise TersorError(f"pairs={tuple(pairs)}: layers {first} and {second} cannot be merged: {reason}")
        used |= {first, second}
    return list(pairs)


def unpairable_reason(first: int, second: int, layers: list[int], config: PreTrainedConfig) -> str | None:
    """Why two layers cannot share directions, None if they can; ``layers`` are those that are compressed."""
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


def _traits(config: PreTrainedConfig, index: int) -> dict[str, object]:
    """What must be equal for two layers' keys and values to be comparable: shape and rotation."""
    own = config.per_layer_config[index]
    names = ("num_key_value_heads", "head_dim", "v_head_dim", "rope_parameters", "partial_rotary_factor")
    traits: dict[str, object] = {name: getattr(own, name, None) for name in names}
    rotated = getattr(config, "no_rope_layers", None)  # 1 for layers that rotate, whatever the name says
    traits["rotary positions"] = rotated[index] if rotated else None
    return traits

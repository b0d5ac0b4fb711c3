"""The search for a plan: measure single settings and each layer alone, give bits where they count, compare.

1. One setting for all layers: of each family the one with the most bits that the budget allows (`single_settings`).
2. Each layer alone, all others uncompressed: its keys and its values in every width. What layers lose nearly adds up.
3. Widths by layer, keys and values apart, with the least sum of losses within the budget (`choose_widths`).
4. The plan of 3 and all settings of 1, on the pieces that choose; what diverges least is taken.
5. The same on the pieces held out, which nothing was chosen by: the figures of the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tersor._errors import TersorError
from tersor.kv.engine.cache import compressible_layers
from tersor.kv.plan import CachePlan
from tersor.kv.recipe import Recipe
from tersor.kv.storage.key_bias import KeyBias
from tersor.kv.tune.losses import Losses, measure, ratio_on
from tersor.kv.tune.singles import WIDTHS, alike_pairs, single_settings, too_small, uniform
from tersor.kv.tune.widths import Cost, choose_widths

#: The width that stands for no loss while the other half of a layer is measured.
WIDEST = WIDTHS[-1]
BY_LAYER = "widths by layer"
#: Pieces on which sizes are looked up.
SIZED = 4


@dataclass(frozen=True)
class Setting:
    """One candidate and what it loses on either half of the pieces."""

    name: str
    recipe: Recipe
    choosing: Losses
    held_out: Losses


@dataclass(frozen=True)
class Layer:
    """What one layer takes and loses by the width of its keys, with its values at the widest, and the other way round.

    Args:
        keys: Of its keys, by width, the widest values included.
        values: Of its values, by width, on top of the widest ones.
        dense: Bytes of the layer in 16 bits.
    """

    keys: dict[int, Cost]
    values: dict[int, Cost]
    dense: int


@dataclass(frozen=True)
class Tuning:
    """What `tune` found.

    Args:
        settings: All candidates, the least divergence on the choosing pieces first; the first one is chosen.
        left_out: How many times smaller those were that missed the budget after all, by name.
        layers: What each compressed layer alone takes and loses, in the model's order.
    """

    settings: tuple[Setting, ...]
    left_out: dict[str, float]
    layers: tuple[Layer, ...]

    @property
    def plan(self) -> CachePlan:
        """The chosen candidate as a plan."""
        recipe = self.settings[0].recipe
        return recipe if isinstance(recipe, CachePlan) else CachePlan(recipes=(recipe,))

    @property
    def best_single(self) -> Setting | None:
        """The best of the settings that are the same for all layers, by the choosing pieces; None if none is left."""
        return next((each for each in self.settings if each.name != BY_LAYER), None)

    def widths(self) -> list[tuple[int, int]] | None:
        """Bits of keys and of values of each compressed layer; None where one setting takes all layers."""
        if (layers := self.plan.layers) is None:
            return None
        recipes = [self.plan.recipes[each] for each in layers]
        return [(each.high_bits, each.value_high_bits or each.high_bits) for each in recipes]  # type: ignore[attr-defined]


def tune(
    model: PreTrainedModel, halves: tuple[Tensor, Tensor], budget: float, tell: Callable[[str], None] = lambda _: None
) -> Tuning:
    """The settings that lose least on ``halves[0]`` at a cache ``budget`` times smaller than 16 bits.

    Args:
        model: In eval mode; every layer with full attention is compressed.
        halves: Ids ``[pieces, tokens]`` of the pieces that choose, and of those held out.
        budget: How many times smaller the compressed layers must be, on the prompts of the pieces.
        tell: Told what is being done.

    Raises:
        ValueError: If nothing reaches the budget.
        NotImplementedError: For models whose caches cannot be compressed or recorded.
    """
    choosing, held_out = halves
    tell("sizes")
    settings = _key_bias(model)
    merging = alike_pairs(model, choosing[:1].to(model.device))
    candidates = single_settings(ratio_on(model, choosing[:SIZED]), budget, merging, settings)
    layers = layers_alone(model, choosing, settings, tell)
    if (plan := plan_of(layers, budget, settings)) is not None:
        candidates[BY_LAYER] = plan
    chosen = measure(model, choosing, candidates, lambda name: tell(f"choosing: {name}"))
    # How much is merged goes by the text, so that a size may not hold on all of them.
    left_out = {name: own.ratio for name, own in chosen.items() if own.ratio < budget}
    candidates = {name: recipe for name, recipe in candidates.items() if name not in left_out}
    if not candidates:
        raise too_small(budget, max(left_out.values()))
    fresh = measure(model, held_out, candidates, lambda name: tell(f"held out: {name}"))
    rows = [Setting(name, recipe, chosen[name], fresh[name]) for name, recipe in candidates.items()]
    return Tuning(tuple(sorted(rows, key=lambda row: row.choosing.mean)), left_out, tuple(layers))


def layers_alone(
    model: PreTrainedModel, pieces: Tensor, settings: dict[str, Any], tell: Callable[[str], None]
) -> list[Layer]:
    """Each layer alone in every width, all others uncompressed.

    Args:
        model: In eval mode.
        pieces: Ids ``[pieces, tokens]``.
        settings: Settings of every `ZipCache`.
        tell: Told what is being done.
    """
    layers = compressible_layers(model.config.get_text_config(decoder=True))
    pairs = [(WIDEST, WIDEST), *((each, WIDEST) for each in WIDTHS[:-1]), *((WIDEST, each) for each in WIDTHS[:-1])]
    recipes = {
        f"layer {index}, keys {keys}-bit, values {values}-bit": uniform(
            keys, values, skip_layers=tuple(each for each in layers if each != index), **settings
        )
        for index in layers
        for keys, values in pairs
    }
    losses = list(measure(model, pieces, recipes, tell).values())
    found = []
    for start in range(0, len(losses), len(pairs)):
        own = dict(zip(pairs, losses[start : start + len(pairs)], strict=True))
        both = own[WIDEST, WIDEST]
        keys = {width: Cost(own[width, WIDEST].held, own[width, WIDEST].mean) for width in WIDTHS}
        values = {
            width: Cost(own[WIDEST, width].held - both.held, own[WIDEST, width].mean - both.mean) for width in WIDTHS
        }
        found.append(Layer(keys, values, both.dense))
    return found


def plan_of(layers: Sequence[Layer], budget: float, settings: dict[str, Any]) -> CachePlan | None:
    """The widths by layer within the budget; None if even the narrowest ones are above it.

    Args:
        layers: What each layer loses and takes.
        budget: How many times smaller than 16 bits the layers must be together.
        settings: Settings of every `ZipCache`.
    """
    parts = [part for layer in layers for part in (layer.keys, layer.values)]
    limit = int(sum(layer.dense for layer in layers) / budget)
    if sum(min(cost.bytes for cost in part.values()) for part in parts) > limit:
        return None
    widths = choose_widths(parts, limit)
    by_layer = list(zip(widths[::2], widths[1::2], strict=True))
    pairs = list(dict.fromkeys(by_layer))
    recipes = tuple(uniform(*pair, **settings) for pair in pairs)
    return CachePlan(recipes=recipes, layers=tuple(pairs.index(pair) for pair in by_layer))


def _key_bias(model: PreTrainedModel) -> dict[str, Any]:
    """Settings that take the key bias out of the keys, where the model adds one that can be."""
    for module in model.get_decoder().modules():
        if getattr(getattr(module, "k_proj", None), "bias", None) is not None:
            with suppress(TersorError):  # a bias that cannot be taken out stays
                KeyBias.of(module)
                return {"subtract_key_bias": True}
    return {}

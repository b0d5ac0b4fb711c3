"""One setting for all layers: what a user would pick without a plan, each as large as a budget of bytes lets it be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tersor._errors import TersorError
from tersor.kv.compose import compose
from tersor.kv.minicache import MiniCache
from tersor.kv.recipe import Recipe
from tersor.kv.zipcache import ZipCache

#: Bits of a stored number, from narrow to wide.
WIDTHS = (2, 3, 4, 8)
#: Widths of salient and of regular tokens.
MIXED = ((3, 2), (4, 2), (4, 3), (8, 4))
#: With fewer salient tokens than this share, two widths are all but one.
LEAST_SHARE = 0.05


def uniform(keys: int, values: int, **settings: Any) -> ZipCache:
    """Every token alike: its keys in ``keys`` bits and its values in ``values``."""
    apart = None if values == keys else values
    return ZipCache(saliency_ratio=1.0, high_bits=keys, value_high_bits=apart, **settings)


def single_settings(
    ratio: Callable[[Recipe], float], budget: float, merging: MiniCache | None, settings: dict[str, Any]
) -> dict[str, Recipe]:
    """The settings of each family that make the cache at least ``budget`` times smaller and keep most bits, by name.

    Args:
        ratio: How many times smaller a recipe makes the cache.
        budget: How many times smaller it must be.
        merging: The pairs of layers to merge, or None for a model without any.
        settings: Settings of every `ZipCache` without merging.

    Raises:
        ValueError: If nothing is small enough; the message says how small the cache can be.
    """

    def fits(recipe: Recipe) -> bool:
        return ratio(recipe) >= budget

    found: dict[str, Recipe] = {}
    small = [pair for pair in product(WIDTHS, repeat=2) if fits(uniform(*pair, **settings))]
    for keys, values in small:
        wider = [each for each in small if each[0] >= keys and each[1] >= values]
        if len(wider) == 1:  # itself
            name = f"uniform {keys}-bit" if keys == values else f"keys {keys}-bit, values {values}-bit"
            found[name] = uniform(keys, values, **settings)
    for high, low in MIXED:
        mixed = _by_share(high, low, settings)
        share = _largest_share(mixed, fits)
        if LEAST_SHARE <= share < 1:
            found[f"ZipCache {high}/{low} r={share:g}"] = mixed(share)
    if merging is not None:
        found |= _merged(fits, merging)
    if not found:
        smallest: list[Recipe] = [uniform(WIDTHS[0], WIDTHS[0], **settings)]
        smallest += [] if merging is None else [replace(merging, bits=WIDTHS[0])]
        raise too_small(budget, max(map(ratio, smallest)))
    return found


def too_small(budget: float, nearest: float) -> TersorError:
    """What is said where no setting reaches ``budget``."""
    reached = f"{math.floor(100 * nearest) / 100:g}"
    return TersorError(
        f"no setting makes the cache {budget:g} times smaller: the nearest is {reached} times, --budget {reached}x; "
        "longer pieces (--tokens) come a little further"
    )


def alike_pairs(model: PreTrainedModel, ids: Tensor) -> MiniCache | None:
    """MiniCache on the pairs of layers that are alike on ``ids``, or else on its default ones; None without any pair.

    Its limit of the error is lifted, because what merging costs is measured here.
    """
    settings: dict[str, Any] = {"max_relative_error": 2.0}
    try:
        return MiniCache(pairs=MiniCache.auto(model, ids).pairs, **settings)
    except TersorError:  # no two layers are alike enough
        recipe = MiniCache(**settings)
    try:
        recipe.cache(model.config)
    except TersorError:  # no two layers can be paired
        return None
    return recipe


def _merged(fits: Callable[[Recipe], bool], merging: MiniCache) -> dict[str, Recipe]:
    """Merged layers in the most bits that fit, and in 4 and 2 bits by saliency."""
    found: dict[str, Recipe] = {}
    alone = {bits: replace(merging, bits=bits) for bits in WIDTHS}
    if small := [bits for bits in WIDTHS if fits(alone[bits])]:
        found[f"MiniCache {small[-1]}-bit"] = alone[small[-1]]
    mixed = _by_share(4, 2, {})
    share = _largest_share(lambda share: compose(mixed(share), merging), fits)
    if LEAST_SHARE <= share < 1:
        found[f"ZipCache 4/2 r={share:g} + MiniCache"] = compose(mixed(share), merging)
    return found


def _by_share(high: int, low: int, settings: dict[str, Any]) -> Callable[[float], ZipCache]:
    """`ZipCache` in two widths, by its share of salient tokens."""
    return lambda share: ZipCache(saliency_ratio=share, high_bits=high, low_bits=low, **settings)


def _largest_share(at: Callable[[float], Recipe], fits: Callable[[Recipe], bool]) -> float:
    """The largest share of salient tokens, in hundredths, whose recipe ``at`` it fits; 0 where none does."""
    low, high = 0, 101
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(at(middle / 100)) else (low, middle)
    return low / 100

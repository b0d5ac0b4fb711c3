"""What merging layers costs, and whether it pays beside fewer bits.

Against the number of merged pairs, deepest first: ways to merge the same pairs, at model precision, so that nothing
but merging is measured: MiniCache with the most distant tokens retained, by its default rule, and without retention,
and the plain average of the two layers.
Against bytes: ZipCache, MiniCache and both together, each over its range of sizes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from tersor._errors import TersorError
from tersor.kv.bench.contenders import Contender, pick
from tersor.kv.compose import compose
from tersor.kv.depth.pairs import MergedPairs
from tersor.kv.method import KVMethod
from tersor.kv.minicache import MiniCache
from tersor.kv.selection.ratio import RecentSelection
from tersor.kv.storage.mixed import MixedPrecisionStorage
from tersor.kv.zipcache import ZipCache

Pairs = Sequence[tuple[int, int]]
#: Settings of each way to merge, by the name that records use.
WAYS: dict[str, dict[str, Any]] = {
    "slerp, 10% retained": {"gamma": 0.1, "retention": "quantile"},
    "slerp, gamma 0.05": {},
    "slerp, none retained": {"gamma": 0.0},
    "mean": {"gamma": 0.0, "merge": "mean"},
}


def merging_contenders(pairs: Pairs, *, gamma: float = 0.05) -> list[Contender]:
    """The full cache, then every way of merging the deepest 1, 2, ... of ``pairs``.

    Args:
        pairs: Pairs of layers that may be merged.
        gamma: How much stays unmerged in the ways that do not say.

    Raises:
        ValueError: Without any pair.
    """
    if not pairs:
        raise TersorError("pairs is empty; give at least one pair of layers to merge, e.g. [(6, 7)]")
    deepest_first = sorted(pairs, reverse=True)
    rivals = pick([])
    for count in range(1, len(pairs) + 1):
        for way, settings in WAYS.items():
            depth = MergedPairs(
                **{"gamma": gamma, **settings},
                pairs=tuple(deepest_first[:count]),
                max_relative_error=math.inf,  # the cost is what is being measured
            )
            method = KVMethod(
                name=way,
                selection=RecentSelection(ratio=1.0),
                storage=MixedPrecisionStorage(high_bits=16),
                depth=depth,
            )
            rivals.append(Contender(f"{way}, {count} pairs", way, method.cache))
    return rivals


#: Families of `stacked_contenders`, as records and plots name them.
ZIPCACHE, MINICACHE, STACKED = "ZipCache", "MiniCache", "ZipCache + MiniCache"


def stacked_contenders(pairs: Pairs) -> list[Contender]:
    """The full cache, then ZipCache and MiniCache alone and together, each from large to small.

    ZipCache's size goes by its share of salient tokens (4 and 2 bits), MiniCache's by its bits.
    """
    merging: dict[str, Any] = {"pairs": tuple(sorted(pairs)), "max_relative_error": math.inf}
    rivals = pick([])
    for ratio in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0):
        zipcache = ZipCache(saliency_ratio=ratio)
        both = compose(zipcache, MiniCache(**merging))
        rivals.append(Contender(f"{ZIPCACHE} 4/2 r={ratio:g}", ZIPCACHE, zipcache.cache))
        rivals.append(Contender(f"{STACKED} 4/2 r={ratio:g}", STACKED, both.cache))
    for bits in (8, 4, 3, 2):
        alone = MiniCache(bits=bits, **merging)
        rivals.append(Contender(f"{MINICACHE} {bits}-bit", MINICACHE, alone.cache))
    return rivals


@torch.no_grad()
def with_longer_layers(model: PreTrainedModel, layers: Sequence[int], factor: float = 2.0) -> PreTrainedModel:
    """A copy that computes the same and caches keys and values ``factor`` times as long in ``layers``.

    Layers of a real model differ in length, which is what MiniCache's split into length and direction is for. The
    factor is taken back by the query and output projections; a power of two changes no bit of the output.

    Raises:
        ValueError: For models whose queries or keys are normalized after their projection.
    """
    model = copy.deepcopy(model)
    for index in layers:
        attention = model.get_decoder().layers[index].self_attn
        if hasattr(attention, "k_norm"):
            raise TersorError(f"{type(model).__name__} normalizes its keys, so the length of its projections is lost")
        for name, change in (("k_proj", factor), ("v_proj", factor), ("q_proj", 1 / factor)):
            for parameter in getattr(attention, name).parameters():
                parameter.mul_(change)
        attention.o_proj.weight.div_(factor)
    return model

"""How similar neighbouring layers cache their tokens: the look at a model before its layers are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tersor._compat import with_cache
from tersor._errors import TersorError
from tersor.kv.depth.guard import Pair
from tersor.kv.depth.merging import MergeRule
from tersor.kv.depth.pairing import unpairable_reason
from tersor.kv.engine.cache import compressible_layers, layer_types


@dataclass(frozen=True)
class PairSimilarity:
    """Two neighbouring layers and one kind; means over tokens and units (see `tersor.kv.depth.merging`).

    Args:
        layers: The two layers.
        kind: "keys" or "values".
        mean_cosine: Cosine of the angle between the layers' directions.
        median_cosine: Its median.
        mean_distance: The angle over pi.
        retained: Share of tokens that would stay unmerged.
        predicted_error: ``|x_hat - x| / |x|`` of the others, mean of both layers.
    """

    layers: Pair
    kind: Literal["keys", "values"]
    mean_cosine: float
    median_cosine: float
    mean_distance: float
    retained: float
    predicted_error: float


@dataclass(frozen=True)
class SimilarityReport:
    """Rows for every two neighbouring layers that could be merged; prints as a table."""

    rows: tuple[PairSimilarity, ...]

    def errors(self) -> dict[Pair, float]:
        """Predicted relative error of each pair, mean of keys and values."""
        sums: dict[Pair, float] = {}
        for row in self.rows:
            sums[row.layers] = sums.get(row.layers, 0.0) + row.predicted_error / 2
        return sums

    def pairs(self, max_relative_error: float = 0.35) -> tuple[Pair, ...]:
        """As many disjoint pairs below the limit as possible, and of those choices the one with the least error.

        Raises:
            ValueError: If there is none; the message has the table.
        """
        # (pairs, minus the error, which pairs): best choice among the layers before each one.
        best: dict[int, tuple[int, float, tuple[Pair, ...]]] = {}

        def upto(layer: int) -> tuple[int, float, tuple[Pair, ...]]:
            return max((choice for end, choice in best.items() if end <= layer), default=(0, 0.0, ()))

        for pair, error in sorted(self.errors().items()):
            if error < max_relative_error:
                count, gain, taken = upto(pair[0])
                best[pair[1] + 1] = max(upto(pair[1] + 1), (count + 1, gain - error, (*taken, pair)))
        if not best:
            raise TersorError(
                f"no two neighbouring layers can be merged below a relative error of {max_relative_error}; "
                f"the layers of this model are too different:\n{self}"
            )
        return max(best.values())[2]

    def __str__(self) -> str:
        lines = ["layers  kind    mean cosine  median  distance  retained  predicted error"]
        for row in self.rows:
            name = f"{row.layers[0]}, {row.layers[1]}"
            lines.append(
                f"{name:<8}{row.kind:<8}{row.mean_cosine:>11.3f}{row.median_cosine:>8.3f}{row.mean_distance:>10.3f}"
                f"{row.retained:>10.1%}{row.predicted_error:>17.3f}"
            )
        return "\n".join(lines)


@torch.no_grad()
def analyze_layer_similarity(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    rule: MergeRule | None = None,
    skip_layers: Sequence[int] = (),
) -> SimilarityReport:
    """Read a text once and compare what neighbouring layers cache.

    Args:
        model: The model to look at.
        input_ids: Text to read, ``[batch, tokens]``.
        attention_mask: 0 for padding, ``[batch, tokens]``; None without any.
        rule: The merging whose error is predicted; the paper's by default.
        skip_layers: Layers that are not to be merged.

    Raises:
        ValueError: If the model has no two neighbouring layers that could be merged.
    """
    config = model.config.get_text_config(decoder=True)
    layers, types = compressible_layers(config, skip_layers), layer_types(config)
    candidates = [first for first in range(len(types) - 1) if not unpairable_reason(first, first + 1, layers, config)]
    if not candidates:
        raise TersorError(
            f"{type(model).__name__} has no two neighbouring layers that could be merged; its layers are {types}"
        )
    cache = DynamicCache(config=model.config)
    model(input_ids=input_ids, attention_mask=attention_mask, **with_cache(cache), logits_to_keep=1)
    valid = None if attention_mask is None else attention_mask.bool()
    rows: list[PairSimilarity] = []
    for first in candidates:
        one, other = cache.layers[first], cache.layers[first + 1]
        rows += _compare(
            (first, first + 1), (one.keys, other.keys), (one.values, other.values), valid, rule or MergeRule()
        )
    return SimilarityReport(tuple(rows))


def _compare(
    layers: Pair,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    valid: Tensor | None,
    rule: MergeRule,
) -> list[PairSimilarity]:
    pairs = [rule.pair(*keys), rule.pair(*values)]
    apart = rule.apart(pairs, valid)
    counted = torch.ones_like(apart) if valid is None else valid
    rows = []
    for kind, pair in zip(("keys", "values"), pairs, strict=True):
        distance = pair.distance[counted[:, None].expand_as(pair.distance)]
        cosine = (distance * torch.pi).cos()
        merged = (counted & ~apart)[:, None].expand_as(pair.distance)
        error = torch.cat([error[merged] for error in pair.errors])
        rows.append(
            PairSimilarity(
                layers=layers,
                kind=kind,  # type: ignore[arg-type]
                mean_cosine=float(cosine.mean()),
                median_cosine=float(cosine.median()),
                mean_distance=float(distance.mean()),
                retained=int(apart.sum()) / int(counted.sum()),
                predicted_error=float(error.mean()) if error.numel() else 0.0,
            )
        )
    return rows

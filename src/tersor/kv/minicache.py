"""MiniCache: neighbouring layers share the directions of their keys and values (arXiv 2405.14366)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from tersor.kv.engine.choices import check_engine_options, check_setting, check_words, pick
from tersor.kv.recipe import PARAM_DTYPES, STORAGE_BITS, Recipe

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tersor.kv.method import KVMethod

#: Bits of the stored directions where neither the user nor another recipe says otherwise.
DEFAULT_BITS = 4


@dataclass(frozen=True, kw_only=True)
class MiniCache(Recipe):
    """Pairs of layers from the middle of the model on store one direction a token; the defaults are the paper's.

    Args:
        start_layer: First layer that may be paired: an index, or a share of all layers.
        pairs: The pairs themselves, instead of that, e.g. ``((16, 17), (20, 21))``. `auto` measures which fit.
        t: Where the shared direction lies: 0 keeps the earlier layer's, 1 the later one's.
        gamma: How much stays unmerged: 0 nothing, 1 everything (nothing is lost then).
        retention: ``"range"`` keeps tokens whose distance is within ``gamma`` of the range below the largest,
            ``"quantile"`` the ``gamma`` most distant ones.
        max_retained_fraction: Largest share of tokens that ``"range"`` keeps, the most distant first.
        granularity: A length for every ``"head"``, or one a ``"token"`` as in the paper's accounting.
        max_relative_error: Warn if merging moves keys and values by more, as a share of their length.
        strict: Raise `ValueError` then, instead of warning.
        bits: Bits of stored directions and unmerged tokens: 2, 3, 4, 8, or 16 for model precision. None is 4, or in a
            composition what the other recipe stores.
        param_dtype: Precision of lengths, minima, steps and scales: "float16", "bfloat16" or "float32".
        streaming_gap: New tokens that are merged together.
        recent_fp_tokens: Newest tokens that stay raw.
        min_tokens_to_compress: Shorter sequences wait uncompressed.
        skip_layers: Layers kept at model precision, and never paired.

    Example:
        >>> import tersor
        >>> model, tokenizer = tersor.zoo.load("tiny-lm")
        >>> inputs = tokenizer("It was a bright cold day in April, " * 4, return_tensors="pt")
        >>> with tersor.MiniCache(max_relative_error=2.0).on(model) as session:
        ...     out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        >>> session.cache.compression_ratio() > 3
        True

    Raises:
        ValueError: For a setting outside its range, or settings that contradict each other.
    """

    start_layer: int | float = 0.5
    pairs: tuple[tuple[int, int], ...] | None = None
    t: float = 0.6
    gamma: float = 0.05
    retention: Literal["range", "quantile"] = "range"
    max_retained_fraction: float = 0.1
    granularity: Literal["head", "token"] = "head"
    max_relative_error: float = 0.35
    strict: bool = False
    bits: int | None = None
    param_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    streaming_gap: int = 100
    recent_fp_tokens: int = 0
    min_tokens_to_compress: int = 32
    skip_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_engine_options(self)
        number = isinstance(self.start_layer, (int, float)) and not isinstance(self.start_layer, bool)
        inside = number and (self.start_layer >= 0 if isinstance(self.start_layer, int) else 0 <= self.start_layer < 1)
        check_setting(
            self,
            "start_layer",
            inside,
            "a layer index, or a share of the layers between 0 and 1; MiniCache.auto(model, input_ids) picks pairs "
            "by measured similarity",
        )
        if self.pairs is not None:
            twos = all(len(pair) == 2 and all(isinstance(i, int) and i >= 0 for i in pair) for pair in self.pairs)
            check_setting(self, "pairs", twos, "pairs of layer indices, e.g. ((2, 3), (4, 5))")
        for name in ("t", "gamma", "max_retained_fraction"):
            check_setting(self, name, 0.0 <= getattr(self, name) <= 1.0, "between 0 and 1")
        check_setting(self, "max_relative_error", self.max_relative_error > 0, "above 0; merging can cost up to 2")
        check_words(
            self,
            bits=(None, *STORAGE_BITS[1:]),
            retention=("range", "quantile"),
            granularity=("head", "token"),
            param_dtype=PARAM_DTYPES,
        )

    @classmethod
    def auto(cls, model: PreTrainedModel, input_ids: Tensor, **settings: Any) -> Self:
        """The recipe whose pairs are those that are similar enough in ``model`` on the text ``input_ids``.

        ``settings`` are those of the recipe, without ``pairs``; ``max_relative_error`` is the limit.

        Raises:
            ValueError: If no pair stays below the limit; the message has the table of similarities.
        """
        from tersor.kv.depth.merging import MergeRule
        from tersor.kv.depth.similarity import analyze_layer_similarity

        recipe = cls(**settings)
        rule = pick(MergeRule, recipe)
        report = analyze_layer_similarity(model, input_ids, rule=rule, skip_layers=recipe.skip_layers)
        return cls(**{**settings, "pairs": report.pairs(recipe.max_relative_error)})

    def choices(self) -> dict[str, str]:
        own = {"depth": "start_layer"}
        return own if self.bits is None else {**own, "selection": f"bits={self.bits}", "storage": f"bits={self.bits}"}

    def method(self) -> KVMethod:
        """Merged pairs; one token group in ``bits``."""
        from tersor.kv.depth.pairs import MergedPairs
        from tersor.kv.method import KVMethod
        from tersor.kv.selection.ratio import RecentSelection
        from tersor.kv.storage.mixed import MixedPrecisionStorage

        return pick(
            KVMethod,
            self,
            name="minicache",
            selection=RecentSelection(ratio=1.0),
            storage=MixedPrecisionStorage(high_bits=self.bits or DEFAULT_BITS, param_dtype=self.param_dtype),
            depth=pick(MergedPairs, self),
        )

    def nominal_compression_ratio(
        self,
        *,
        layers: int = 32,
        width: int = 4096,
        head_dim: int = 128,
        group_size: int = 128,
        count_lengths: bool = True,
    ) -> float:
        """The paper's accounting for these settings: 16-bit parameters of groups, 16-bit lengths, no positions.

        ``gamma`` counts as the share of retained tokens. The published 5.02 is ``MiniCache(gamma=0)`` with
        ``count_lengths=False``; merging alone can never save more than 4/3.

        Args:
            layers: Layers of the model.
            width: KV heads times ``head_dim``.
            head_dim: Channels of a head.
            group_size: Numbers that share a minimum and a step.
            count_lengths: Whether lengths count, as 16 bits each.
        """
        bits = self.bits or DEFAULT_BITS
        per_number = 16.0 if bits == 16 else bits + 32 / group_size
        merged = self._merged_layers(layers) / layers
        lengths = 16 * (1 if self.granularity == "token" else width / head_dim) if count_lengths else 0.0
        kept = width * per_number * (1 - merged / 2 + merged * self.gamma) + merged * lengths
        return 16 * width / kept

    def _merged_layers(self, layers: int) -> int:
        if self.pairs is not None:
            return 2 * len(self.pairs)
        start = self.start_layer if isinstance(self.start_layer, int) else int(self.start_layer * layers)
        return max(0, (layers - start) // 2 * 2)

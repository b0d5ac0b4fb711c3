"""ZipCache: KV cache in 4 and 2 bits, chosen per token by normalized attention (arXiv 2405.14256)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tersor._errors import TersorError
from tersor.kv.engine.choices import check_engine_options, check_setting, check_words, pick
from tersor.kv.recipe import PARAM_DTYPES, STORAGE_BITS, Recipe

if TYPE_CHECKING:
    from tersor.kv.method import KVMethod


@dataclass(frozen=True, kw_only=True)
class ZipCache(Recipe):
    """Salient tokens in ``high_bits``, regular ones in ``low_bits``; the defaults are the paper's.

    Args:
        saliency_ratio: Share of salient tokens of every segment (the paper uses 0.4 to 0.7 by model and task).
        high_bits: Bits of salient tokens: 2, 3, 4, 8, or 16 for model precision.
        low_bits: Bits of regular tokens, likewise; 0 evicts them.
        value_high_bits: Another width for the values of salient tokens: 2, 3, 4 or 8; None is that of the keys.
        value_low_bits: Likewise for regular tokens.
        subtract_key_bias: For models whose keys have a large bias (Qwen2 class): store keys without it and add its
            part of the scores back exactly. Costs about one more attention product a step.
        probe_recent_ratio: Share of a prompt's rows, at its end, that score its tokens.
        probe_random_ratio: Share of its other rows that do.
        saliency_scope: One choice of tokens a ``"layer"``, or a ``"kv_head"``.
        value_param_scope: Value parameters per ``"token"``, or per ``"token_head"``.
        max_probe_tokens: Largest number of probe rows; 2048 is a good one above 32k tokens. None sets no limit.
        streaming_gap: New tokens that are compressed together.
        recent_fp_tokens: Newest tokens that stay raw.
        min_tokens_to_compress: Shorter sequences wait uncompressed.
        param_dtype: Precision of minima, steps and scales: "float16", "bfloat16" or "float32".
        skip_layers: Layers kept at model precision.
        check_finite: Raise on NaN or infinity in a cache, naming the layer.
        seed: Seed of the random probe rows.

    Example:
        >>> import tersor
        >>> model, tokenizer = tersor.zoo.load("tiny-lm")
        >>> inputs = tokenizer("It was a bright cold day in April, " * 4, return_tensors="pt")
        >>> with tersor.ZipCache(saliency_ratio=0.6).on(model) as session:
        ...     out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        >>> session.cache.compression_ratio() > 2
        True

    Raises:
        ValueError: For a setting outside its range, or settings that contradict each other.
    """

    saliency_ratio: float = 0.6
    high_bits: int = 4
    low_bits: int = 2
    value_high_bits: int | None = None
    value_low_bits: int | None = None
    subtract_key_bias: bool = False
    probe_recent_ratio: float = 0.05
    probe_random_ratio: float = 0.05
    saliency_scope: Literal["layer", "kv_head"] = "layer"
    value_param_scope: Literal["token", "token_head"] = "token"
    max_probe_tokens: int | None = None
    streaming_gap: int = 100
    recent_fp_tokens: int = 0
    min_tokens_to_compress: int = 32
    param_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    skip_layers: tuple[int, ...] = ()
    check_finite: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_engine_options(self)
        for name in ("saliency_ratio", "probe_recent_ratio", "probe_random_ratio"):
            check_setting(self, name, 0.0 <= getattr(self, name) <= 1.0, "a share between 0 and 1")
        check_setting(self, "high_bits", self.high_bits in STORAGE_BITS[1:], f"one of {STORAGE_BITS[1:]}")
        check_setting(self, "low_bits", self.low_bits in STORAGE_BITS, f"one of {STORAGE_BITS}; 0 evicts")
        check_setting(self, "high_bits", self.high_bits >= self.low_bits, f"at least low_bits={self.low_bits}")
        for name, beside in (("value_high_bits", "high_bits"), ("value_low_bits", "low_bits")):
            packed = (None, *STORAGE_BITS[1:-1])
            check_setting(self, name, getattr(self, name) in packed, f"one of {packed}")
            both = getattr(self, name) is None or getattr(self, beside) not in (0, 16)
            check_setting(self, name, both, f"None where {beside} is 0 or 16")
        exact = self.subtract_key_bias and 16 in (self.high_bits, self.low_bits)
        check_setting(self, "subtract_key_bias", not exact, "False with 16 bits: raw keys are exact as they are")
        check_words(
            self,
            saliency_scope=("layer", "kv_head"),
            value_param_scope=("token", "token_head"),
            param_dtype=PARAM_DTYPES,
        )
        enough = self.max_probe_tokens is None or self.max_probe_tokens >= 1
        check_setting(self, "max_probe_tokens", enough, "at least 1")
        if self.saliency_scope == "kv_head" and self.value_param_scope == "token":
            raise TersorError(
                "saliency_scope='kv_head' needs value_param_scope='token_head': when every head picks its own tokens, "
                "one parameter pair a token would be shared by different tokens"
            )

    def choices(self) -> dict[str, str]:
        return {"selection": "saliency_ratio", "storage": "high_bits and low_bits"}

    def method(self) -> KVMethod:
        """Selection by normalized attention, mixed-precision storage."""
        from tersor.kv.method import KVMethod
        from tersor.kv.selection.ratio import SaliencySelection
        from tersor.kv.storage.mixed import MixedPrecisionStorage

        selection = pick(SaliencySelection, self, ratio=self.saliency_ratio, scope=self.saliency_scope)
        return pick(KVMethod, self, name="zipcache", selection=selection, storage=pick(MixedPrecisionStorage, self))

    def nominal_compression_ratio(self, *, batch: int = 8, tokens: int = 840, width: int = 4096) -> float:
        """The paper's accounting for these settings: 16-bit parameters, shared by the batch, positions not counted.

        Args:
            batch: Rows of the prompt; the defaults are the paper's.
            tokens: Tokens of each row.
            width: KV heads times head dimension.
        """
        from tersor.lowbit.bytes import nominal_compression_ratio

        high = (self.high_bits + (self.value_high_bits or self.high_bits)) / 2
        low = (self.low_bits + (self.value_low_bits or self.low_bits)) / 2
        bits = self.saliency_ratio * high + (1 - self.saliency_ratio) * low
        return nominal_compression_ratio("mixed", bits=bits, batch=batch, tokens=tokens, width=width)

"""ZipVL: prompts attend, and are stored, by as many tokens as each layer needs (arXiv 2410.08584, both versions)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from tersor.kv.engine.choices import check_counts, check_layers, check_setting, check_words, pick
from tersor.kv.recipe import PARAM_DTYPES, STORAGE_BITS, Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel

    from tersor.kv.method import KVMethod
    from tersor.kv.selection.mass import MassSelection


@dataclass(frozen=True, kw_only=True)
class ZipVL(Recipe):
    """The smallest set of tokens that holds ``tau`` of the attention mass takes part in a prompt's attention, layer by
    layer; the defaults are the paper's.

    Args:
        tau: Share of the attention that must be held, above 0 and at most 1; 1 is dense. 0.96 is the paper's other one.
        policy: What becomes of the other tokens' keys and values: ``"evict"`` drops them (the paper's second version),
            ``"quantize"`` stores them in ``low_bits`` and the important ones in ``high_bits`` (the first), ``"keep"``
            leaves the cache as it is. Evicted tokens were judged by the question at the end of the prompt; for several
            questions about one picture use one of the others.
        probe_recent: Rows of attention at the end of the prompt that score its tokens.
        probe_random: Other rows that do.
        protect: ``"text"`` leaves out visual tokens only, ``"none"`` any.
        protect_recent: Tokens at the end of a prompt that always stay.
        protect_first: Tokens at its start that always stay.
        query_mode: ``"drop"`` leaves the attention output of the other tokens at zero (the paper), ``"compute"``
            restricts keys only, which saves less.
        skip_layers: Layers that stay dense. ``(0,)`` costs little and often saves accuracy: no later layer has seen
            hidden states without the first layer's attention.
        min_tokens: Shorter prompts are read densely, since probing costs more than it saves.
        high_bits: Bits of important tokens with ``policy="quantize"``: 2, 3, 4, 8, or 16 for model precision.
        low_bits: Bits of the others, likewise.
        recompress_every: New tokens that ``policy="quantize"`` compresses together.
        param_dtype: Precision of minima, steps and scales with ``policy="quantize"``.
        check_finite: Raise on scores, keys or values that are NaN or infinite, naming the layer.
        seed: Seed of the random probe rows, together with the layer and the length of the prompt.

    Inside ``with ZipVL().on(model):`` a forward over prompt and completion at once takes ``completion_mask=`` (bool
    ``[batch, tokens]``, True for the completion). Tokens are chosen by the prompt alone, and the completion attends as
    generated tokens do; with ``policy="quantize"`` as if nothing were rounded. It runs without a cache and has
    gradients. With gradient checkpointing call ``backward`` inside of the ``with`` statement too, since it computes
    layers again.

    Example:
        >>> import tersor
        >>> model, tokenizer = tersor.zoo.load("tiny-lm")
        >>> inputs = tokenizer("It was a bright cold day in April, " * 8, return_tensors="pt")
        >>> with tersor.ZipVL(tau=0.9).on(model) as session:
        ...     out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        >>> session.stats.token_ratio < 1
        True

    Raises:
        ValueError: For a setting outside its range.
    """

    tau: float = 0.975
    policy: Literal["evict", "quantize", "keep"] = "evict"
    probe_recent: int = 64
    probe_random: int = 64
    protect: Literal["none", "text"] = "none"
    protect_recent: int = 1
    protect_first: int = 0
    query_mode: Literal["drop", "compute"] = "drop"
    skip_layers: tuple[int, ...] = ()
    min_tokens: int = 256
    high_bits: int = 4
    low_bits: int = 2
    recompress_every: int = 100
    param_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    check_finite: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        number = isinstance(self.tau, (int, float)) and not isinstance(self.tau, bool)
        check_setting(self, "tau", number and 0.0 < self.tau <= 1.0, "a share above 0 and at most 1")
        check_words(
            self,
            policy=("evict", "quantize", "keep"),
            protect=("none", "text"),
            query_mode=("drop", "compute"),
            param_dtype=PARAM_DTYPES,
        )
        check_counts(
            self, probe_recent=1, probe_random=0, protect_recent=1, protect_first=0, min_tokens=0, recompress_every=1
        )
        for name in ("high_bits", "low_bits"):
            allowed = STORAGE_BITS[1:]
            check_setting(self, name, getattr(self, name) in allowed, f"one of {allowed}; policy='evict' drops tokens")
        check_setting(self, "high_bits", self.high_bits >= self.low_bits, f"at least low_bits={self.low_bits}")
        check_layers(self)

    @classmethod
    def for_ratio(
        cls, model: PreTrainedModel, samples: Sequence[Mapping[str, Any]], ratio: float, **settings: Any
    ) -> Self:
        """The recipe whose ``tau`` keeps about ``ratio`` of the tokens of ``samples``, on average over layers.

        See `tersor.kv.target_ratio.find_tau`.

        Args:
            model: The model that will run.
            samples: Keywords of the model, e.g. what its processor returns for a few of your own prompts.
            ratio: Share of tokens to keep.
            **settings: Settings of the recipe, without ``tau``.

        Raises:
            ValueError: For a ratio that no ``tau`` reaches, e.g. because layers are skipped or prompts are short.
        """
        from tersor.kv.selection.mass import MassSelection
        from tersor.kv.target_ratio import find_tau

        recipe = cls(**settings)
        tau = find_tau(pick(MassSelection, recipe), recipe.method_with, model, samples, ratio)
        return cls(**{**settings, "tau": tau})

    def choices(self) -> dict[str, str]:
        own = {"prefill": f"tau={self.tau}"}
        by = f"policy={self.policy!r}"
        return own if self.policy == "keep" else {**own, "selection": by, "storage": by}

    @property
    def _first(self) -> int:
        """Tokens from which ``policy="quantize"`` stores what was read: a prompt's choice, or a segment's worth."""
        return max(1, min(self.min_tokens, self.recompress_every))

    def engine_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"skip_layers": self.skip_layers} if self.skip_layers else {}
        if self.policy == "quantize":
            options |= {"streaming_gap": self.recompress_every, "min_tokens_to_compress": self._first}
        elif self.policy == "evict":
            options |= {"streaming_gap": None, "min_tokens_to_compress": None}
        return options

    def method(self) -> KVMethod:
        """Selection by attention mass, a sparse prefill, and the storage that ``policy`` names."""
        from tersor.kv.selection.mass import MassSelection

        return self.method_with(pick(MassSelection, self))

    def method_with(self, selection: MassSelection) -> KVMethod:
        """The method for these settings with another selection than that of ``tau``."""
        from tersor.kv.method import KVMethod
        from tersor.kv.prefill.sparse import SparsePrefill
        from tersor.kv.selection.ratio import RecentSelection
        from tersor.kv.storage.mixed import MixedPrecisionStorage

        prefill = pick(SparsePrefill, self, selection=selection, protect_text=self.protect == "text")
        high, low = {"evict": (16, 0), "quantize": (self.high_bits, self.low_bits), "keep": (16, 16)}[self.policy]
        storage = pick(MixedPrecisionStorage, self, high_bits=high, low_bits=low)
        # With "evict" and "keep" no generated token ever leaves the buffer.
        options = {"streaming_gap": None, "min_tokens_to_compress": None, **self.engine_options()}
        stored = RecentSelection(ratio=1.0) if self.policy == "keep" else selection
        return KVMethod(name="zipvl", selection=stored, storage=storage, prefill=prefill, **options)

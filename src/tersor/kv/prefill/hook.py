"""The hooks of a session: each forward gets a compressed cache, and, where the prefill is sparse, its state.

See `tersor.kv.engine.state` for what attention layers are told.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from tersor._compat import take_cache
from tersor._errors import TersorError, UnsupportedError
from tersor.kv.engine.cache import CompressedCache, compressible_layers
from tersor.kv.engine.choices import Choices
from tersor.kv.engine.state import COMPLETION, STATE, THRESHOLDS, ForwardState, RowThresholds, UncachedPrompt
from tersor.kv.engine.takeover import cache_name


@dataclass
class Latest:
    """What a session used last.

    Args:
        cache: The compressed cache.
        state: The forward over a prompt, where the prefill is sparse.
        uncached: Where the prompt of a running `generate` without a cache ends.
        forwards: How many forwards of the model the session has seen.
        thresholds: What the rows of the forwards to come are read with, where it is not the method's own.
    """

    cache: CompressedCache | None = None
    state: ForwardState | None = None
    uncached: UncachedPrompt | None = None
    forwards: int = 0
    thresholds: RowThresholds | None = None


def compressed(given: Any, new_cache: Callable[[], CompressedCache]) -> CompressedCache:
    """The cache that a call was given if it is compressed, a new one instead of none or an empty one of the library.

    Raises:
        ValueError: If it holds tokens that the method has not read.
        NotImplementedError: If it is of a kind that no compressed cache can stand in for.
    """
    if isinstance(given, CompressedCache):
        return given
    if given is not None and not isinstance(given, DynamicCache):
        raise UnsupportedError(
            f"a {type(given).__name__} cannot be compressed; pass no cache, or one made by .cache(model.config)"
        )
    if given is not None and given.get_seq_length():
        raise TersorError(
            f"the {type(given).__name__} holds {given.get_seq_length()} tokens already; start with an empty one, "
            "or one made by .cache(model.config), so that the prompt is read by the method"
        )
    return new_cache()


class ForwardHook:
    """What happens before and after each forward of a model in a session.

    Args:
        choices: The method's choices.
        model: The model that gets the hooks.
        new_cache: Makes an empty cache for it.
        latest: Told of the cache and the state of each forward.

    Raises:
        NotImplementedError: If the model takes no cache, or a keyword of its forward cannot reach its attention layers
            where the prefill is sparse.
    """

    def __init__(
        self, choices: Choices, model: PreTrainedModel, new_cache: Callable[[], CompressedCache], latest: Latest
    ):
        self.choices, self.new_cache, self.latest = choices, new_cache, latest
        self.cache_name, self.model_name = cache_name(model), type(model).__name__
        parameters = inspect.signature(model.forward).parameters
        if choices.prefill.sparse and not any(
            each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()
        ):
            raise UnsupportedError(
                f"{type(model).__name__}.forward takes no further keywords, so the state of a sparse prefill cannot "
                "reach its attention layers; use a method with a dense prefill, such as ZipCache"
            )
        self.names = list(parameters)
        text = model.config.get_text_config(decoder=True)
        self.layers = frozenset(compressible_layers(text, choices.skip_layers))
        self._checked: CompressedCache | None = None

    def before(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Check and complete the keywords of one forward.

        Raises:
            ValueError: For a mask of a wrong shape or without a sparse prefill, a filled cache of another kind, another
                number of thresholds than rows, or ``protect="text"`` where nothing says which tokens are text.
            NotImplementedError: For a static cache.
        """
        self.latest.forwards += 1
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        completion, thresholds = kwargs.pop(COMPLETION, None), kwargs.pop(THRESHOLDS, self.latest.thresholds)
        tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            return (), kwargs  # for the model to complain about
        if completion is not None and not self.choices.prefill.sparse:
            raise TersorError(f"{COMPLETION} is for a sparse prefill; {self.choices.name} reads prompts densely")
        if thresholds is not None:
            self.accept(thresholds)
        past = take_cache(kwargs)
        if completion is not None and (past is not None or kwargs.get("use_cache")):
            raise TersorError(
                f"{COMPLETION} is for a forward over prompt and completion at once, without a cache; leave the cache "
                "and use_cache out"
            )
        if completion is None and self.latest.uncached is not None:
            completion = self._after_prompt(self.latest.uncached, tokens)
        if completion is not None:
            completion = self._teacher_forced(completion, tokens, kwargs)
        elif not self._uses_cache(model, past, kwargs):
            if self.choices.prefill.sparse:
                warnings.warn(
                    "without a cache nothing says where the prompt ends, so this forward is dense; pass "
                    f"{COMPLETION}= (bool [batch, tokens], True for tokens after the prompt)",
                    stacklevel=3,
                )
            return (), kwargs
        else:
            if past is not None and not self.choices.prefill.sparse and not isinstance(past, CompressedCache):
                kwargs[self.cache_name] = past  # the caller's own choice; a dense prefill needs nothing of it
                return (), kwargs
            self.latest.cache = kwargs[self.cache_name] = past = compressed(past, self.new_cache)
            past.meet(model)
            if not self.choices.prefill.sparse or not self._reads_sparsely(past, tokens.shape[1]):
                return (), kwargs
        visual = visual_tokens(model.config, kwargs, tokens.shape[1])
        if visual is None and self.choices.prefill.protect_text:
            raise TersorError(
                "protect='text' needs to know which tokens are text: pass input_ids or mm_token_type_ids to a model "
                "whose configuration names its image tokens; or leave protect at 'none'"
            )
        if thresholds is not None and len(thresholds.tau) != tokens.shape[0]:
            raise TersorError(
                f"{len(thresholds.tau)} thresholds for a forward of {tokens.shape[0]} rows; give one a row, and mind "
                "those that generate adds for beams and num_return_sequences"
            )
        state = ForwardState(self.choices, self.layers, visual, completion, thresholds)
        self.latest.state = kwargs[STATE] = state
        return (), kwargs

    def after(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Check that attention read what the forward cached.

        Raises:
            NotImplementedError: If it did not: nothing would ever be compressed, or only by guesses.
        """
        state: ForwardState | None = kwargs.get(STATE)
        if state is not None and not state.records:
            self.latest.state = None
            raise UnsupportedError(
                f"no layer of {type(model).__name__} read the prompt sparsely: its attention layers do not get the "
                "keywords of its forward; use a method with a dense prefill, such as ZipCache"
            )
        if isinstance(cache := kwargs.get(self.cache_name), CompressedCache):
            self.check(cache)

    def accept(self, thresholds: RowThresholds) -> None:
        """Check that rows can have thresholds of their own.

        Raises:
            ValueError: If no threshold decides, or one does for generated tokens, too.
        """
        if not self.choices.prefill.by_threshold or self.choices.streaming_gap is not None:
            raise TersorError(
                f"{self.choices.name} as it is set takes no {THRESHOLDS} by row; use ZipVL with a tau below 1 and "
                "policy='evict' or 'keep'"
            )

    def check(self, cache: CompressedCache) -> None:
        """Check once that a cache holds tokens, and that tersor's attention has read them; see `after`."""
        if cache is self._checked:
            return
        used = [layer for layer in cache.compressed_layers() if layer.get_seq_length()]
        if not used or not all(layer.attended for layer in used):
            what = "does not fill the cache that it is given" if not used else "changes keys and values that it cached"
            raise UnsupportedError(
                f"{self.model_name} {what}, so its cache cannot be compressed; use the library's own here"
            )
        self._checked = cache

    def _reads_sparsely(self, past: CompressedCache, tokens: int) -> bool:
        """Whether a forward over so many tokens is a prompt, or a long enough part of a conversation."""
        return not past.get_seq_length() or self.choices.prefill.takes_part(tokens)

    def _after_prompt(self, prompt: UncachedPrompt, tokens: Tensor) -> Tensor:
        """Where the completion is in a forward of `generate` without a cache."""
        prompt.tokens = prompt.tokens or tokens.shape[1]
        place = torch.arange(tokens.shape[1], device=tokens.device)
        return (place >= prompt.tokens).expand(tokens.shape[0], -1)

    def _teacher_forced(self, completion: Tensor, tokens: Tensor, kwargs: dict[str, Any]) -> Tensor:
        completion = completion.bool()
        if completion.shape != tokens.shape[:2]:
            raise TersorError(
                f"{COMPLETION} has shape {tuple(completion.shape)}, but the input is {tuple(tokens.shape[:2])}; it "
                "needs one entry a token"
            )
        real = kwargs.get("attention_mask")
        prompt = ~completion if real is None or real.ndim != 2 else ~completion & real.bool()
        if bool((prompt & completion.cummax(1).values).any()):
            raise TersorError(f"{COMPLETION} marks tokens in front of others of the prompt; completions come last")
        kwargs["use_cache"] = False
        return completion

    def _uses_cache(self, model: PreTrainedModel, past: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the forward fills a cache, its own or one that the library would make."""
        if past is not None:
            return True
        use = kwargs.get("use_cache")
        wanted = getattr(model.config.get_text_config(decoder=True), "use_cache", True) if use is None else use
        return bool(wanted) and not (model.training and torch.is_grad_enabled())


def visual_tokens(config: PreTrainedConfig, kwargs: dict[str, Any], columns: int) -> Tensor | None:
    """Which tokens of a forward show an image or a video, bool ``[batch, columns]``; None where nothing says so."""
    types = kwargs.get("mm_token_type_ids")
    if types is not None:
        return nn.functional.pad(types[:, :columns] != 0, (0, columns - types.shape[1]))
    names = ("image_token_id", "video_token_id")
    ids = [token for name in names if (token := getattr(config, name, None)) is not None]
    inputs = kwargs.get("input_ids")
    if inputs is None or not ids:
        return None
    return torch.isin(inputs, torch.tensor(ids, device=inputs.device))

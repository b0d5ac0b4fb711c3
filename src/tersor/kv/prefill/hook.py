"""The hook that tells a model's attention layers which forward they are part of; see `tersor.kv.engine.state`."""

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

from tersor.kv.engine.cache import CompressedCache, compressible_layers
from tersor.kv.engine.choices import Choices
from tersor.kv.engine.state import COMPLETION, STATE, UNCACHED, ForwardState


@dataclass
class Latest:
    """What a session used last.

    Args:
        cache: The compressed cache.
        state: The forward over a prompt, where the prefill is sparse.
    """

    cache: CompressedCache | None = None
    state: ForwardState | None = None


class ForwardHook:
    """The pre-hook of a session whose prefill is sparse.

    Args:
        choices: The method's choices.
        model: The model that gets the hook.
        new_cache: Makes an empty cache for it.
        latest: Told of the cache and the state of each forward.

    Raises:
        NotImplementedError: If a keyword of the model's forward cannot reach its attention layers.
    """

    def __init__(
        self, choices: Choices, model: PreTrainedModel, new_cache: Callable[[], CompressedCache], latest: Latest
    ):
        self.choices, self.new_cache, self.latest = choices, new_cache, latest
        parameters = inspect.signature(model.forward).parameters
        if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
            raise NotImplementedError(
                f"{type(model).__name__}.forward takes no further keywords, so the state of a sparse prefill cannot "
                "reach its attention layers; use a method with a dense prefill, such as ZipCache"
            )
        self.names = list(parameters)
        text = model.config.get_text_config(decoder=True)
        self.layers = frozenset(compressible_layers(text, choices.skip_layers))

    def __call__(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Check and complete the keywords of one forward.

        Raises:
            ValueError: For a mask of a wrong shape, a filled cache of another kind, or ``protect="text"`` where nothing
                says which tokens are text.
            NotImplementedError: For a static cache.
        """
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        completion, uncached = kwargs.pop(COMPLETION, None), kwargs.pop(UNCACHED, None)
        tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            return (), kwargs  # for the model to complain about
        if completion is None and uncached is not None:
            uncached.tokens = uncached.tokens or tokens.shape[1]
            place = torch.arange(tokens.shape[1], device=tokens.device)
            completion = (place >= uncached.tokens).expand(tokens.shape[0], -1)
        if completion is not None:
            completion = self._teacher_forced(completion, tokens, kwargs)
        elif not self._with_cache(model, kwargs):
            warnings.warn(
                "without a cache nothing says where the prompt ends, so this forward is dense; pass "
                f"{COMPLETION}= (bool [batch, tokens], True for tokens after the prompt)",
                stacklevel=3,
            )
            return (), kwargs
        elif kwargs["past_key_values"].get_seq_length():
            return (), kwargs  # a later chunk of text, or a decoding step: dense over what is stored
        visual = visual_tokens(model.config, kwargs, tokens.shape[1])
        if visual is None and self.choices.prefill.protect_text:
            raise ValueError(
                "protect='text' needs to know which tokens are text: pass input_ids or mm_token_type_ids to a model "
                "whose configuration names its image tokens; or leave protect at 'none'"
            )
        state = ForwardState(self.choices, self.layers, visual, completion)
        self.latest.state = kwargs[STATE] = state
        return (), kwargs

    def _teacher_forced(self, completion: Tensor, tokens: Tensor, kwargs: dict[str, Any]) -> Tensor:
        completion = completion.bool()
        if completion.shape != tokens.shape[:2]:
            raise ValueError(
                f"{COMPLETION} has shape {tuple(completion.shape)}, but the input is {tuple(tokens.shape[:2])}; it "
                "needs one entry a token"
            )
        past = kwargs.get("past_key_values")
        if past is not None and past.get_seq_length():
            raise ValueError(
                f"{COMPLETION} is for a forward over prompt and completion at once, without a filled cache"
            )
        real = kwargs.get("attention_mask")
        prompt = ~completion if real is None or real.ndim != 2 else ~completion & real.bool()
        if bool((prompt & completion.cummax(1).values).any()):
            raise ValueError(f"{COMPLETION} marks tokens in front of others of the prompt; completions come last")
        kwargs |= {"past_key_values": None, "use_cache": False}
        return completion

    def _with_cache(self, model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
        """Whether the forward fills a compressed cache; makes one where the library would make its own."""
        past = kwargs.get("past_key_values")
        if past is None:
            use = kwargs.get("use_cache")
            wanted = getattr(model.config.get_text_config(decoder=True), "use_cache", True) if use is None else use
            if not wanted or (model.training and torch.is_grad_enabled()):
                return False
            past = self.new_cache()
        elif not isinstance(past, CompressedCache):
            if not isinstance(past, DynamicCache):
                raise NotImplementedError(
                    f"a {type(past).__name__} cannot hold a different number of tokens in each layer; pass no cache, "
                    "or one made by .cache(model.config)"
                )
            if past.get_seq_length():
                raise ValueError(
                    f"the {type(past).__name__} holds {past.get_seq_length()} tokens already; start with an empty one, "
                    "or one made by .cache(model.config), so that the prompt is read by the method"
                )
            past = self.new_cache()
        self.latest.cache = kwargs["past_key_values"] = past
        return True


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

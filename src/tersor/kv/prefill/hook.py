"""What one forward over a prompt knows beyond the tensors that attention gets, and how it reaches the attention.

A hook on the top-level model puts a `ForwardState` among the forward's keywords, and the model hands it down to every
attention call. As an argument of each layer it is there again when gradient checkpointing computes the layer a second
time in the backward pass; a global variable or a ``with`` block around the forward would be gone by then.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from tersor.kv.engine.cache import CompressedCache, compressible_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from tersor.kv.method import KVMethod, Session
    from tersor.kv.storage.segments import Chosen

#: Keyword under which a forward's state travels to the attention function.
STATE = "tersor_state"
#: Keyword of the user: bool ``[batch, tokens]``, True where a token belongs to a completion and not to the prompt.
COMPLETION = "completion_mask"
#: Keyword by which `generate` without a cache tells each of its forwards where the prompt ends.
UNCACHED = "tersor_uncached_prompt"


@dataclass(frozen=True)
class LayerRecord:
    """What a sparse prefill did in one layer.

    ``kept``: tokens in the attention, columns of the input. ``prompt``: bool ``[batch, tokens]``, those it was chosen
    from. ``mass``: share of the attention that the kept ones hold, ``[batch]``. ``skipped``: why every token was kept,
    or None.
    """

    kept: Chosen
    prompt: Tensor
    mass: Tensor
    skipped: str | None


@dataclass
class ForwardState:
    """One forward over a prompt.

    ``layers``: those that may be sparse. ``visual``, ``completion``: bool ``[batch, tokens]``, which tokens show an
    image or a video, and which follow the prompt; None where not known. ``records``: what happened, by layer.
    """

    method: KVMethod
    layers: frozenset[int]
    visual: Tensor | None = None
    completion: Tensor | None = None
    records: dict[int, LayerRecord] = field(default_factory=dict)

    def covers(self, module: nn.Module, kwargs: dict[str, Any]) -> bool:
        """Whether ``module`` is an attention layer of the text decoder that may be sparse without a cache."""
        if self.completion is None or not getattr(module, "is_causal", True) or kwargs.get("sliding_window"):
            return False
        return getattr(module, "layer_idx", None) in self.layers


class UncachedPrompt:
    """Where the prompt of a ``generate(use_cache=False)`` ends; its first forward tells."""

    tokens: int | None = None


class ForwardHook:
    """The pre-hook of a `Session` whose method has a sparse prefill."""

    def __init__(self, session: Session):
        self.session = session
        model = session.model
        parameters = inspect.signature(model.forward).parameters
        if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
            raise NotImplementedError(
                f"{type(model).__name__}.forward takes no further keywords, so the state of a sparse prefill cannot "
                "reach its attention layers; use a method with a dense prefill, such as ZipCache"
            )
        self.names = list(parameters)
        self.layers = frozenset(
            compressible_layers(model.config.get_text_config(decoder=True), self.method.skip_layers)
        )

    @property
    def method(self) -> KVMethod:
        return self.session.method

    def __call__(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Check and complete the keywords of one forward.

        Raises:
            ValueError: for a mask of a wrong shape, a filled cache of another kind, or ``protect="text"`` where nothing
                says which tokens are text.
            NotImplementedError: for a static cache.
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
        if visual is None and self.method.prefill.protect_text:  # type: ignore[attr-defined]
            raise ValueError(
                "protect='text' needs to know which tokens are text: pass input_ids or mm_token_type_ids to a model "
                "whose configuration names its image tokens; or leave protect at 'none'"
            )
        state = ForwardState(self.method, self.layers, visual, completion)
        self.session.state = kwargs[STATE] = state
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
        """Whether the forward fills a cache of the method's; makes one where the library would make its own."""
        past = kwargs.get("past_key_values")
        if past is None:
            use = kwargs.get("use_cache")
            wanted = getattr(model.config.get_text_config(decoder=True), "use_cache", True) if use is None else use
            if not wanted or (model.training and torch.is_grad_enabled()):
                return False
            past = self.method.cache(model.config)
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
            past = self.method.cache(model.config)
        self.session.cache = kwargs["past_key_values"] = past
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

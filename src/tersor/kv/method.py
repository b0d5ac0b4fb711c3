"""A KV method: four independent choices, and the session that runs a model with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

import tersor.kv.engine.attention  # noqa: F401  (registers the attention function)
from tersor._compat import check_transformers
from tersor.kv.depth.base import Depth, SeparateLayers
from tersor.kv.engine.cache import CompressedCache
from tersor.kv.engine.choices import Choices
from tersor.kv.engine.layer import ATTENTION_NAME
from tersor.kv.engine.state import UNCACHED, ForwardState, UncachedPrompt
from tersor.kv.prefill.hook import ForwardHook, Latest
from tersor.kv.prefill.sparsity import SparsityStats, sparsity_stats


@dataclass(frozen=True, kw_only=True)
class KVMethod(Choices):
    """How a cache is compressed; recipes such as `ZipCache` make one.

    Args:
        depth: How layers share what they store; the other choices are those of `Choices`.

    Raises:
        ValueError: For an option outside its range, or choices that contradict each other.
    """

    depth: Depth = field(default_factory=SeparateLayers)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.depth.check(self)

    def cache(self, config: PreTrainedConfig, *, offloading: bool = False) -> CompressedCache:
        """An empty cache for a model of this ``config``, to pass as ``past_key_values``."""
        return CompressedCache(config, self, self.depth.build, offloading=offloading)

    def on(self, model: PreTrainedModel) -> Session:
        """A session for ``model``: use it in a ``with`` statement, or call `enable` and `disable`."""
        return Session(self, model)


class Session:
    """A model running with a KV method; leaving restores the model as it was.

    Inside, ``model.generate`` builds a compressed cache whenever it is given none, and ``session.cache`` is the
    latest one. Caches made by ``method.cache(model.config)`` work the same way. With a sparse prefill a forward of the
    model does so too, takes ``completion_mask=`` (see `ZipVL`), and ``session.stats`` says what was left out.

    Args:
        method: The method to run with.
        model: The model to run.

    Raises:
        NotImplementedError: On entry, for models whose attention cannot be chosen or has nothing to compress.
        RuntimeError: On entry, if another session is active on the model.
    """

    def __init__(self, method: KVMethod, model: PreTrainedModel):
        check_transformers()
        self.method = method
        self.model = model
        self._latest = Latest()
        self._previous: str | dict[str, str] | None = None
        self._hook: RemovableHandle | None = None

    @property
    def cache(self) -> CompressedCache | None:
        """The latest compressed cache."""
        return self._latest.cache

    @property
    def state(self) -> ForwardState | None:
        """The latest forward over a prompt, where the prefill is sparse."""
        return self._latest.state

    @property
    def stats(self) -> SparsityStats:
        """What a sparse prefill left out of the latest prompt, and what the cache takes now.

        Raises:
            ValueError: Before the first prompt, and for methods with a dense prefill.
        """
        if self.state is None:
            raise ValueError(
                "no prompt has been read by a sparse prefill in this session"
                + (
                    "; run the model first"
                    if self.method.prefill.sparse
                    else f": {self.method.name} reads prompts densely"
                )
            )
        return sparsity_stats(self.state, self.cache if self.state.completion is None else None, self.model.config)

    def enable(self) -> Self:
        """Take the model over; see `Session` for what is raised."""
        model = self.model
        if "_prepare_cache_for_generation" in vars(model):
            raise RuntimeError("another session is active on this model; disable() it first")
        # Built once so that an unsupported model is refused here and not in the middle of a generation.
        new_cache = partial(self.method.cache, model.config)
        new_cache()
        hook = ForwardHook(self.method, model, new_cache, self._latest) if self.method.prefill.sparse else None
        key = _text_config_key(model.config)
        self._previous = _implementations(model.config)
        model.set_attn_implementation(ATTENTION_NAME if key is None else {key: ATTENTION_NAME})
        if model.config.get_text_config(decoder=True)._attn_implementation != ATTENTION_NAME:
            self._restore_attention()
            raise NotImplementedError(
                f"{type(model).__name__} does not let its attention function be chosen "
                "(it does not go through transformers' AttentionInterface), so its cache cannot be compressed"
            )
        prepare = model._prepare_cache_for_generation

        def prepare_cache(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if self.method.prefill.sparse:
                _check_generation(generation_config)
            if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
                model_kwargs["past_key_values"] = self._latest.cache = new_cache()
            elif self.method.prefill.sparse and not generation_config.use_cache:
                model_kwargs[UNCACHED] = UncachedPrompt()
            return prepare(generation_config, model_kwargs, *args, **kwargs)

        vars(model)["_prepare_cache_for_generation"] = prepare_cache
        if hook is not None:
            self._hook = model.register_forward_pre_hook(hook, with_kwargs=True)
        return self

    def disable(self) -> None:
        """Give the model its own attention function and cache back; does nothing when not enabled."""
        if self._previous is not None:
            vars(self.model).pop("_prepare_cache_for_generation", None)
            if self._hook is not None:
                self._hook.remove()
                self._hook = None
            self._restore_attention()

    def _restore_attention(self) -> None:
        self.model.set_attn_implementation(self._previous)
        self._previous = None

    def __enter__(self) -> Self:
        return self.enable()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()


def _check_generation(generation_config: Any) -> None:
    """Refuse ways of generating that a sparse prefill cannot serve; raises `NotImplementedError`."""
    if generation_config.prefill_chunk_size is not None:
        raise NotImplementedError(
            "prefill_chunk_size does not go with a sparse prefill, which chooses tokens by the end of the whole "
            "prompt; leave it out"
        )
    if generation_config.cache_implementation is not None:
        raise NotImplementedError(
            f"cache_implementation={generation_config.cache_implementation!r} cannot hold a different number of tokens "
            "in each layer; leave it out"
        )


def _text_config_key(config: PreTrainedConfig) -> str | None:
    """The name of the text decoder's configuration inside a composite one, None if it is the whole."""
    text = config.get_text_config(decoder=True)
    if text is config:
        return None
    for key in config.sub_configs:
        if getattr(config, key, None) is text:
            return str(key)
    raise NotImplementedError(f"cannot find the text decoder of {type(config).__name__} among its sub-configurations")


def _implementations(config: PreTrainedConfig) -> str | dict[str, str]:
    """The attention implementations of a configuration, in the form that `set_attn_implementation` takes."""
    if not config.sub_configs:
        return str(config._attn_implementation)
    parts = {key: getattr(config, key)._attn_implementation for key in config.sub_configs if getattr(config, key)}
    return {"": config._attn_implementation, **parts}

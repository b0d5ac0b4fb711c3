"""The session: a model that runs with a KV method until it is left."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import tersor.kv.engine.attention  # noqa: F401  (registers the attention functions)
from tersor._compat import check_peft, check_transformers, take_cache, with_cache
from tersor._errors import TersorError, UnsupportedError
from tersor.kv.engine.cache import CompressedCache
from tersor.kv.engine.choices import Choices
from tersor.kv.engine.state import ForwardState, RowThresholds, UncachedPrompt
from tersor.kv.engine.takeover import Takeover, inner_model
from tersor.kv.prefill.hook import ForwardHook, Latest, compressed
from tersor.kv.prefill.sparsity import SparsityStats, sparsity_stats


class Session:
    """A model running with a KV method; leaving restores the model as it was.

    Inside, ``model.generate`` and forwards of the model fill a compressed cache whenever they are given none, and
    ``session.cache`` is the latest one. Caches made by ``method.cache(model.config)`` work the same way. With a sparse
    prefill a forward takes ``completion_mask=`` (see `ZipVL`), and ``session.stats`` says what was left out. Calls from
    other threads than the one that entered the session are left alone, with a warning.

    Args:
        method: The method to run with.
        new_cache: Makes an empty cache for a configuration.
        model: The model to run, or a wrapper that holds it, such as a PEFT or a compiled model.

    Raises:
        NotImplementedError: On entry, for models whose attention cannot be chosen or has nothing to compress; in the
            first forward, for models whose attention does not read the cache.
        RuntimeError: On entry, if another session is active on the model.
        TypeError: If there is no model of transformers in ``model``.
    """

    def __init__(self, method: Choices, new_cache: Callable[..., CompressedCache], model: nn.Module):
        check_transformers()
        check_peft(model)
        self.method = method
        self.model: PreTrainedModel = inner_model(model)
        self._new_cache = partial(new_cache, self.model.config)
        self._latest = Latest()
        self._undo: list[Callable[[], None]] = []

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

        A prompt is read whole, or is the latest part of a longer conversation that was long enough to be sparse.

        Raises:
            ValueError: Before the first prompt, and for methods with a dense prefill.
        """
        if self.state is None:
            raise TersorError(
                "no prompt has been read by a sparse prefill in this session"
                + (
                    "; run the model first"
                    if self.method.prefill.sparse
                    else f": {self.method.name} reads prompts densely"
                )
            )
        return sparsity_stats(self.state, self.cache if self.state.completion is None else None, self.model.config)

    @contextmanager
    def thresholds(self, tau: Tensor, *, differentiable: bool = False) -> Iterator[None]:
        """Inside, every row of a prompt is read with its own threshold; a forward alone takes ``thresholds=``, too.

        They travel with each forward, so that gradient checkpointing computes the same again.

        Args:
            tau: See `RowThresholds`.
            differentiable: Likewise.

        Raises:
            RuntimeError: Outside of the session.
            ValueError: For shares outside their range, and for methods in which no threshold decides, or one does for
                generated tokens, too (``policy="quantize"``).
        """
        if not self._undo:
            raise RuntimeError("the session is not active; enter it first")
        rows = RowThresholds(tau, differentiable)
        self._hook.accept(rows)
        before, self._latest.thresholds = self._latest.thresholds, rows
        try:
            yield
        finally:
            self._latest.thresholds = before

    def enable(self) -> Self:
        """Take the model over; see `Session` for what is raised. A failure leaves the model as it was."""
        model = self.model
        if any(isinstance(getattr(each, "__self__", None), Session) for each in vars(model).values()):
            raise RuntimeError("another session is active on this model; disable() it first")
        # Built once so that an unsupported model is refused here and not in the middle of a generation.
        self._new_cache()
        takeover = Takeover(model)
        self._hook = ForwardHook(self.method, model, self._new_cache, self._latest)
        self._thread = threading.get_ident()
        self._generate = model.generate
        self._own_generate = vars(model).get("generate")
        try:
            self._undo.append(takeover.restore)
            takeover.change()
            self._undo.append(self._give_generate_back)
            vars(model)["generate"] = self._generate_compressed
            before = model.register_forward_pre_hook(self._mine(self._hook.before), with_kwargs=True)
            self._undo.append(before.remove)
            after = model.register_forward_hook(self._mine(self._hook.after), with_kwargs=True)
            self._undo.append(after.remove)
        except BaseException:
            self.disable()
            raise
        return self

    def disable(self) -> None:
        """Give the model its own attention function and cache back; does nothing when not enabled."""
        while self._undo:
            self._undo.pop()()

    def _give_generate_back(self) -> None:
        vars(self.model).pop("generate", None)
        if self._own_generate is not None:
            vars(self.model)["generate"] = self._own_generate

    def _mine(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook that runs in the session's own thread only."""

        @torch.compiler.disable
        def run(*args: Any) -> Any:
            if threading.get_ident() == self._thread:
                return hook(*args)
            self._warn_of_thread(f"a forward of {type(self.model).__name__}")
            return None

        return run

    def _warn_of_thread(self, what: str) -> None:
        warnings.warn(
            f"{what} runs in another thread than the one that entered the session of {self.method.name}, so its cache "
            "is not compressed; enter the session in the thread that runs the model",
            stacklevel=3,
        )

    def _generate_compressed(self, *args: Any, **kwargs: Any) -> Any:
        """What ``model.generate`` is inside the session."""
        if threading.get_ident() != self._thread:
            self._warn_of_thread("generate")
            return self._generate(*args, **kwargs)
        options = self._options(args, kwargs)
        use_cache = self._check_generation(options)
        forwards = self._latest.forwards
        if use_cache:
            cache: Any = self._cache_for(take_cache(kwargs))
            if options("is_assistant"):
                cache.activate_past_recording()  # as the library does for caches that it makes
            kwargs |= with_cache(cache)
        else:
            self._latest.uncached = UncachedPrompt()
        try:
            output = self._generate(*args, **kwargs)
        finally:
            self._latest.uncached = None
        if self.method.prefill.sparse and self._latest.forwards == forwards:
            raise UnsupportedError(
                f"generate of {type(self.model).__name__} runs no forward of its own, so no prompt was read sparsely; "
                "use a method with a dense prefill, such as ZipCache"
            )
        latest = self._latest.cache
        if use_cache and latest is not None and latest is cache:
            self._hook.check(latest)
        return output

    def _cache_for(self, given: Any) -> Any:
        """The cache of a call of `generate`: one of another kind is the caller's choice, where the prefill is dense."""
        other = given is not None and not isinstance(given, CompressedCache)
        if other and not self.method.prefill.sparse and (type(given) is not DynamicCache or given.get_seq_length()):
            warnings.warn(
                f"generate was given a {type(given).__name__}, which {self.method.name} does not compress; pass no "
                "cache, or one made by .cache(model.config)",
                stacklevel=3,
            )
            return given
        self._latest.cache = compressed(given, self._new_cache)
        return self._latest.cache

    def _options(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[str], Any]:
        """The settings of a call of `generate`, by name, wherever they were given."""
        bound = inspect.signature(self._generate).bind_partial(*args, **kwargs).arguments
        configs = (bound.get("generation_config"), self.model.generation_config)

        def option(name: str) -> Any:
            values = (kwargs.get(name), *(getattr(each, name, None) for each in configs))
            return next((value for value in values if value is not None), None)

        return option

    def _check_generation(self, option: Callable[[str], Any]) -> bool:
        """Whether a call of `generate` uses a cache.

        Raises:
            NotImplementedError: For ways of generating that the method cannot serve.
            ValueError: If there would be nothing to compress.
        """
        sparse, implementation = self.method.prefill.sparse, option("cache_implementation")
        if sparse and option("prefill_chunk_size") is not None:
            raise UnsupportedError(
                "prefill_chunk_size does not go with a sparse prefill, which chooses tokens by the end of the whole "
                "prompt; leave it out"
            )
        # Older models name the library's default, which means none.
        if implementation not in (None, "hybrid"):
            raise UnsupportedError(
                f"cache_implementation={implementation!r} is a cache of the library's, which {self.method.name} cannot "
                "compress; leave it out"
            )
        if option("use_cache") is False:
            if not sparse:
                raise TersorError(
                    f"use_cache=False leaves {self.method.name} nothing to compress; leave it out, or generate outside "
                    "the session"
                )
            return False
        return True

    def __enter__(self) -> Self:
        return self.enable()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

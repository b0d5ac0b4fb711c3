"""Experts under continuous batching: requests of several experts join and leave one running batch of transformers.

The library packs the tokens of all requests into one row ``[1, tokens]``, so experts are told apart by token. Which
tokens belong to which request is known where a step's tensors are prepared; that is private to the library, and this
file is the only one that looks at it.

Blocks of the cache are never shared between requests: two experts that read the same prompt make different keys.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor

from tersor._compat import untested_for_continuous_batching
from tersor._errors import TersorError, UnsupportedError
from tersor.experts.config import ExpertBusyError
from tersor.experts.host import ExpertHost
from tersor.experts.linear import PackedRoutes, ResidentExpert


def _private(manager: Any, path: str) -> Any:
    """A private method of the library's manager.

    Raises:
        UnsupportedError: If the installed release has no such method.
    """
    try:
        found = attrgetter(path)(manager)
    except AttributeError:
        found = None
    if not callable(found):
        raise UnsupportedError(
            f"experts under continuous batching need {path}() of transformers' manager, which the installed release "
            "does not have: use ExpertHost.generate, which batches requests that come together"
        )
    return found


class Asked(NamedTuple):
    """A request of a batch: its expert, which is held on the device, and what draws its tokens for the library."""

    expert: str | None
    resident: ResidentExpert | None
    pick: Callable[[Tensor], int] | None


class ExpertBatch:
    """A running batch. Results come from ``manager`` as the library documents: ``get_result``, iteration, handlers.

    Attributes:
        limit: Tokens of a request at most, its answer included: what the cache and the model's positions hold.
        on_end: Called with the id of each request that left the batch, in whatever way, after its expert is free again.
    """

    def __init__(self, host: ExpertHost, manager: Any, tokens: int) -> None:
        """``tokens`` is what the cache holds."""
        self.host, self.manager = host, manager
        self.on_end: Callable[[str], None] | None = None
        positions = getattr(host.model.config.get_text_config(), "max_position_embeddings", None)
        self.limit = min(tokens, positions or tokens)
        self._draws = False
        self._requests: dict[str, Asked] = {}
        self._kept: list[Asked] = []
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._around("batch_processor.inputs_and_outputs.prepare_batch_tensors", after=self._route)
        self._around("batch_processor.scheduler.clear_cancelled_requests", after=self._cancelled)
        self._around("output_router.deliver", before=lambda output: self._delivered([output]))
        self._around("output_router.deliver_batch", before=self._delivered)
        # Until a step tells of its tokens no pass is answered: if the library prepared it elsewhere, the base would be.
        self._tell([], [])

    def _around(self, path: str, *, before: Any = None, after: Any = None) -> None:
        """Have a private method of the manager call ``before`` with its arguments, or ``after`` with its result and
        them.
        """
        inner = _private(self.manager, path)

        def call(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(*args, **kwargs)
            result = inner(*args, **kwargs)
            if after is not None:
                after(result, *args, *kwargs.values())
            return result

        owner, _, name = path.rpartition(".")
        setattr(attrgetter(owner)(self.manager), name, call)

    def let_requests_draw(self) -> None:
        """Have requests that bring a ``pick`` draw their own tokens.

        Raises:
            UnsupportedError: If the installed transformers draws elsewhere.
        """
        if not self._draws:
            self._around("batch_processor.model_runner._sample", after=self._pick)
            self._draws = True

    @property
    def running(self) -> bool:
        """Whether the manager's thread runs and takes requests."""
        status = self.manager.background_thread_status
        return bool(self.manager.is_running() and status.can_accept_new_requests() is None)

    def add_request(
        self,
        input_ids: Sequence[int],
        expert: str | None = None,
        *,
        pick: Callable[[Tensor], int] | None = None,
        **kwargs: Any,
    ) -> str:
        """Queue a prompt for an expert, None is the base; returns the request's id.

        Args:
            input_ids: Of the prompt.
            expert: Who answers.
            pick: Draws a token from the model's own logits ``[vocabulary]`` (float32), in the batch's thread; what it
                raises ends the batch. The library draws where there is none.
            kwargs: As the library's ``add_request`` takes them, such as ``max_new_tokens`` and ``streaming``; the
                tokens that end the answer are the expert's own by default.

        Raises:
            UnknownExpertError: If the name is not registered.
            ExpertBusyError: If the batch has stopped, or there is no room for the expert.
            ValueError: If the id is in use, or prompt and answer together are longer than `limit`.
        """
        new = kwargs.get("max_new_tokens") or 1
        if len(input_ids) + new > self.limit:  # which would end the batch for all
            raise TersorError(
                f"a prompt of {len(input_ids)} tokens and max_new_tokens={new} are more than the {self.limit} that the "
                "cache holds for a request; shorten one of them"
            )
        if pick is not None:
            self.let_requests_draw()
        name = kwargs.pop("request_id", None) or f"request-{next(self._numbers)}"
        resident = None if expert is None else self.host.hold(expert)
        if expert is not None and (ends := self.host.settings(expert).get("eos_token_id")) is not None:
            kwargs.setdefault("eos_token_id", ends)
        with self._lock:
            taken = name in self._requests
            if not taken:
                self._requests[name] = Asked(expert, resident, pick)
        if taken:
            if expert is not None:
                self.host.release(expert)
            raise TersorError(f"request id {name!r} is in use; give another one")
        try:
            if not self.running or self.manager.add_request(list(input_ids), request_id=name, **kwargs) is None:
                raise ExpertBusyError("the batch has stopped, so it takes no request; start another one")
        except BaseException:
            self._forget([name])
            raise
        return name

    def cancel_request(self, request_id: str) -> None:
        """Stop a request; its expert is free again once the running step is over."""
        self.manager.cancel_request(request_id)

    def close(self) -> None:
        """Give back all experts."""
        self._forget(list(self._requests))
        self.host.route(None)

    def _route(self, _: None, requests: Sequence[Any], *rest: Any) -> None:
        """Tell the host which tokens of the step, and which of the kept ones, belong to which expert."""
        asked = [self._requests[request.state.request_id] for request in requests]
        tokens: list[ResidentExpert | None] = []
        for request, own in zip(requests, asked, strict=True):
            tokens += [own.resident] * request.query_length
        self._kept = [own for request, own in zip(requests, asked, strict=True) if request.has_new_token]
        # The library computes as many logits as there are requests; the last ones stand for prompts that are not read
        # to their end yet, and are dropped.
        nobody = [None] * (len(requests) - len(self._kept))
        self._tell(tokens, [*(own.resident for own in self._kept), *nobody])

    def _pick(self, _: None, scores: Tensor, output_ids: Tensor) -> None:
        """Put the tokens that requests draw for themselves ``[.., rows]`` in the place of the library's."""
        for row, own in enumerate(self._kept):
            if own.pick is not None:
                output_ids[0, row] = own.pick(scores[0, row])

    def _tell(self, tokens: Sequence[ResidentExpert | None], kept: Sequence[ResidentExpert | None]) -> None:
        model = self.host.model
        self.host.route(PackedRoutes(tokens, kept, model.get_output_embeddings(), model.device))

    def _cancelled(self, states: Sequence[Any]) -> None:
        names = [state.request_id for state in states]
        router = self.manager.output_router
        with router._lock:  # the library drops a handler with the last result, and a cancelled request has none
            for name in names:
                router.result_handlers.pop(name, None)
        self._forget(names)

    def _delivered(self, outputs: Sequence[Any]) -> None:
        self._forget([output.request_id for output in outputs if output.is_finished()])

    def _forget(self, names: Sequence[str]) -> None:
        for name in names:
            with self._lock:
                own = self._requests.pop(name, None)
            if own is not None and own.expert is not None:
                self.host.release(own.expert)
            if own is not None and self.on_end is not None:
                self.on_end(name)


@contextmanager
def continuous_batching(
    host: ExpertHost, *, num_blocks: int, max_batch_tokens: int, generation_config: Any = None, **settings: Any
) -> Iterator[ExpertBatch]:
    """Serve requests of a host's experts in one running batch; inside the block the host answers nothing else.

        with continuous_batching(host, num_blocks=64, max_batch_tokens=512) as batch:
            name = batch.add_request(ids, "math", max_new_tokens=32)
            output = batch.manager.get_result(name)

    Args:
        num_blocks: Blocks of the cache.
        max_batch_tokens: Tokens of one step.
        generation_config: The library's; by default the model's.
        settings: Further fields of the library's ``ContinuousBatchingConfig``, such as ``page_size``; block sharing and
            asynchronous batching stay off.

    Raises:
        ExpertBusyError: If a batch runs on the host already.
        UnsupportedError: If the installed transformers is not a tested one, or lacks what this wraps;
            `ExpertHost.generate` needs none.
        ValueError: If a request asks for several sequences, which would be requests without an expert.
    """
    from transformers import ContinuousBatchingConfig

    if (release := untested_for_continuous_batching()) is not None:
        raise UnsupportedError(
            f"experts under continuous batching were not tested with transformers {release}: use ExpertHost.generate, "
            "which batches requests that come together, or install a release that was"
        )
    if host.batching:
        raise ExpertBusyError("a continuous batch runs on this host already; add requests to it, or wait until it ends")
    config = host.model.generation_config if generation_config is None else generation_config
    if (config.num_return_sequences or 1) != 1:
        raise TersorError(
            f"num_return_sequences={config.num_return_sequences} must be 1; add the request several times"
        )
    settings |= {"allow_block_sharing": False, "use_async_batching": False, "use_cuda_graph": False}
    attention = host.model.config._attn_implementation
    batching = ContinuousBatchingConfig(num_blocks=num_blocks, max_batch_tokens=max_batch_tokens, **settings)
    manager = host.model.init_continuous_batching(generation_config=config, continuous_batching_config=batching)
    try:
        # The library makes it when its thread starts; made now, no step goes by unseen.
        manager.batch_processor = _private(manager, "_create_batch_processor")()
        batch = ExpertBatch(host, manager, num_blocks * batching.page_size)
    except BaseException:
        # The library puts back only what a manager that ran had replaced.
        host.model.set_attn_implementation(attention)
        raise
    manager.start()
    try:
        yield batch
    finally:
        manager.stop(block=True)
        manager.destroy()
        batch.close()

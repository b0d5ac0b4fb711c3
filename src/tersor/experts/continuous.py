"""Experts under continuous batching: requests of several experts join and leave one running batch of transformers.

The library packs the tokens of all requests into one row ``[1, tokens]``, so experts are told apart by token. Which
tokens belong to which request is known where a step's tensors are prepared; that is private to the library, and this
file is the only one that looks at it.

Blocks of the cache are never shared between requests: two experts that read the same prompt make different keys.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

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


class ExpertBatch:
    """A running batch. Results come from ``manager`` as the library documents: ``get_result``, iteration, handlers."""

    def __init__(self, host: ExpertHost, manager: Any) -> None:
        self.host, self.manager = host, manager
        self._requests: dict[str, tuple[str | None, ResidentExpert | None]] = {}
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
        its first argument.
        """
        inner = _private(self.manager, path)

        def call(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(*args, **kwargs)
            result = inner(*args, **kwargs)
            if after is not None:
                after(result, *(args or tuple(kwargs.values()))[:1])
            return result

        owner, _, name = path.rpartition(".")
        setattr(attrgetter(owner)(self.manager), name, call)

    def add_request(self, input_ids: Sequence[int], expert: str | None = None, **kwargs: Any) -> str:
        """Queue a prompt for an expert, None is the base; returns the request's id.

        Args:
            kwargs: As the library's ``add_request`` takes them, such as ``max_new_tokens`` and ``streaming``; the
                tokens that end the answer are the expert's own by default.

        Raises:
            UnknownExpertError: If the name is not registered.
            ValueError: If the id is in use.
        """
        name = kwargs.pop("request_id", None) or f"request-{next(self._numbers)}"
        resident = None if expert is None else self.host.hold(expert)
        if expert is not None and (ends := self.host.settings(expert).get("eos_token_id")) is not None:
            kwargs.setdefault("eos_token_id", ends)
        with self._lock:
            taken = name in self._requests
            if not taken:
                self._requests[name] = (expert, resident)
        if taken:
            if expert is not None:
                self.host.release(expert)
            raise TersorError(f"request id {name!r} is in use; give another one")
        try:
            self.manager.add_request(list(input_ids), request_id=name, **kwargs)
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

    def _route(self, _: None, requests: Sequence[Any]) -> None:
        """Tell the host which tokens of the step, and which of the kept ones, belong to which expert."""
        tokens: list[ResidentExpert | None] = []
        kept: list[ResidentExpert | None] = []
        for request in requests:
            expert = self._requests[request.state.request_id][1]
            tokens += [expert] * request.query_length
            kept += [expert] * bool(request.has_new_token)
        # The library computes as many logits as there are requests; the last ones stand for prompts that are not read
        # to their end yet, and are dropped.
        kept += [None] * (len(requests) - len(kept))
        self._tell(tokens, kept)

    def _tell(self, tokens: Sequence[ResidentExpert | None], kept: Sequence[ResidentExpert | None]) -> None:
        model = self.host.model
        self.host.route(PackedRoutes(tokens, kept, model.get_output_embeddings(), model.device))

    def _cancelled(self, states: Sequence[Any]) -> None:
        self._forget([state.request_id for state in states])

    def _delivered(self, outputs: Sequence[Any]) -> None:
        self._forget([output.request_id for output in outputs if output.is_finished()])

    def _forget(self, names: Sequence[str]) -> None:
        for name in names:
            with self._lock:
                expert = self._requests.pop(name, (None, None))[0]
            if expert is not None:
                self.host.release(expert)


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
        UnsupportedError: If the installed transformers lacks what this wraps; `ExpertHost.generate` needs none.
        ValueError: If a request asks for several sequences, which would be requests without an expert.
    """
    from transformers import ContinuousBatchingConfig

    if host.batching:
        raise ExpertBusyError("a continuous batch runs on this host already; add requests to it, or wait until it ends")
    config = host.model.generation_config if generation_config is None else generation_config
    if (config.num_return_sequences or 1) != 1:
        raise TersorError(
            f"num_return_sequences={config.num_return_sequences} must be 1; add the request several times"
        )
    settings |= {"allow_block_sharing": False, "use_async_batching": False, "use_cuda_graph": False}
    attention = host.model.config._attn_implementation
    manager = host.model.init_continuous_batching(
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=num_blocks, max_batch_tokens=max_batch_tokens, **settings
        ),
    )
    try:
        # The library makes it when its thread starts; made now, no step goes by unseen.
        manager.batch_processor = _private(manager, "_create_batch_processor")()
        batch = ExpertBatch(host, manager)
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

"""The two ways to run many requests at once: a batch that they join and leave, and batches of those that came together.

Both draw tokens by `Job.pick`, so that a request reads the same from either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from tersor._errors import TersorError
from tersor.experts.config import ExpertBusyError
from tersor.experts.continuous import ExpertBatch, continuous_batching
from tersor.experts.generation import ExpertGenerationConfig
from tersor.experts.host import ExpertHost
from tersor.experts.server.engine import LOOK, BatchStoppedError, Engine
from tersor.experts.server.jobs import Failure, Job
from tersor.experts.server.sampling import NotFiniteError

PAGE = 32


def positions(host: ExpertHost) -> int | None:
    """Tokens that the model has places for, None where it says nothing."""
    found: int | None = getattr(host.model.config.get_text_config(), "max_position_embeddings", None)
    return found


class ContinuousBatcher:
    """transformers' continuous batching: a request begins as soon as there is a place, beside those that run.

    Args:
        host: The experts.
        places: Requests at once.
        tokens: What the key/value cache holds of all of them.
        step_tokens: Tokens of one pass at most; longer prompts are read in parts.
    """

    def __init__(self, host: ExpertHost, *, places: int = 16, tokens: int = 16_384, step_tokens: int = 512) -> None:
        if places < 1 or tokens < PAGE or step_tokens < places:
            raise TersorError(
                f"places={places} must be at least 1, tokens={tokens} at least {PAGE}, and step_tokens={step_tokens} "
                "at least as many as places"
            )
        self.host, self.places, self.blocks, self.step_tokens = host, places, tokens // PAGE, step_tokens
        self.limit = min(self.blocks * PAGE, positions(host) or self.blocks * PAGE)
        self._batch: ExpertBatch | None = None

    def run(self, engine: Engine) -> None:
        """See `Batcher`."""
        ours = GenerationConfig(do_sample=False, eos_token_id=-1)  # each request has its own
        with continuous_batching(
            self.host, num_blocks=self.blocks, max_batch_tokens=self.step_tokens, page_size=PAGE,
            max_requests_per_batch=self.places, generation_config=ours,
        ) as batch:  # fmt: skip
            self._batch, status = batch, batch.manager.background_thread_status
            engine.started()
            try:
                self._feed(engine, batch)
            finally:
                self._batch = None
                for job in list(engine.running):
                    batch.cancel_request(job.id)
        if not engine.closing:
            raise status.fatal_error or BatchStoppedError("the batching thread ended")

    def _feed(self, engine: Engine, batch: ExpertBatch) -> None:
        """Let jobs join and leave until the batch stops, or the engine closes."""
        jobs: dict[str, Job] = {}
        failed: set[str] = set()

        def left(name: str) -> None:
            if jobs[name].over:
                engine.ended(jobs.pop(name))
            else:  # the library failed it: alone, or with the whole batch, which is for the engine to tell
                failed.add(name)

        batch.on_end = left
        while batch.running and not engine.closing:
            for job in engine.take(self.places - len(engine.running), LOOK):
                jobs[job.id] = job
                try:
                    self._add(batch, job)
                except ExpertBusyError:  # the batch has stopped
                    return
                if job.over:  # it was cancelled between the two
                    batch.cancel_request(job.id)
            while batch.manager.get_result(timeout=0) is not None:
                pass  # answers were told token by token
            while batch.running and failed:
                engine.ended(jobs.pop(failed.pop()))

    def cancel(self, job: Job) -> None:
        """See `Batcher`."""
        if (batch := self._batch) is not None:
            batch.cancel_request(job.id)

    def _add(self, batch: ExpertBatch, job: Job) -> None:
        batch.add_request(
            job.prompt, job.expert, pick=job.pick, request_id=job.id, max_new_tokens=job.max_new_tokens,
            eos_token_id=sorted(job.ends),
        )  # fmt: skip


class StaticBatcher:
    """One `generate` after the other, each of requests that came within a short time; a compressed cache can run in it.

    Args:
        host: The experts.
        places: Requests of a batch.
        wait: Seconds that the first request of a batch waits for others.
        session: Gives a context for each batch, such as ``ZipCache().on(model)``.
    """

    def __init__(
        self,
        host: ExpertHost,
        *,
        places: int = 16,
        wait: float = 0.02,
        session: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if places < 1 or wait < 0:
            raise TersorError(f"places={places} must be at least 1, and wait={wait} must not be negative")
        self.host, self.places, self.wait, self.session = host, places, wait, session
        self.limit = positions(host) or 2**31

    def run(self, engine: Engine) -> None:
        """See `Batcher`."""
        engine.started()
        while not engine.closing:
            jobs = engine.take(self.places, LOOK)
            if not jobs:
                continue
            deadline = jobs[0].came + self.wait
            while len(jobs) < self.places and (left := deadline - time.monotonic()) > 0:
                jobs += engine.take(self.places - len(jobs), left)
            with self._ending(engine, jobs):
                self._answer(engine, jobs)

    def cancel(self, job: Job) -> None:
        """See `Batcher`; the row is computed on with the batch, and told to nobody."""

    @contextmanager
    def _ending(self, engine: Engine, jobs: list[Job]) -> Iterator[None]:
        """Give back the experts of a batch; an error of the model fails these jobs and no others."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            for job in jobs:
                job.finish(Failure(503, "batch_failed", f"the batch failed: {error}; try again"))
        finally:
            for job in jobs:
                engine.ended(job)

    @torch.inference_mode()
    def _answer(self, engine: Engine, jobs: list[Job]) -> None:
        device = self.host.model.device
        longest = max(len(job.prompt) for job in jobs)
        ids = torch.tensor([[0] * (longest - len(job.prompt)) + list(job.prompt) for job in jobs], device=device)
        mask = torch.tensor([[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in jobs], device=device)
        config = ExpertGenerationConfig(
            do_sample=False, max_new_tokens=max(job.max_new_tokens for job in jobs), pad_token_id=0
        )
        with self.session(), self.host.use([job.expert for job in jobs]) as model:
            model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config,
                logits_processor=LogitsProcessorList([Draw(engine, jobs)]),
                stopping_criteria=StoppingCriteriaList([End(jobs)]),
            )  # fmt: skip


@dataclass
class Draw(LogitsProcessor):  # type: ignore[misc]
    """Leaves each row only the token that its job draws."""

    engine: Engine
    jobs: list[Job]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As the library wants it: ``[rows, vocabulary]`` to the same."""
        only = torch.full_like(scores, -torch.inf)
        for row, job in enumerate(self.jobs):
            only[row, 0 if job.over else self._token(job, scores[row])] = 0
        return only

    def _token(self, job: Job, logits: Tensor) -> int:
        try:
            return job.pick(logits.float())
        except NotFiniteError as error:
            self.engine.mark_broken(job.expert)
            job.finish(self.engine.refused(job.expert) or Failure(500, "not_finite", str(error)))
            return 0


@dataclass
class End(StoppingCriteria):  # type: ignore[misc]
    """Ends the rows whose jobs are over."""

    jobs: list[Job]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """As the library wants it."""
        return torch.tensor([job.over for job in self.jobs], device=input_ids.device)


def batcher_named(
    name: str, host: ExpertHost, *, places: int, tokens: int, step_tokens: int, wait: float, session: Any
) -> ContinuousBatcher | StaticBatcher:
    """The batcher of ``--batching``.

    Args:
        name: "continuous", "static", or "auto": continuous, unless there is a session or the installed release cannot.
        host: The experts.
        places: Requests at once.
        tokens: See `ContinuousBatcher`.
        step_tokens: See `ContinuousBatcher`.
        wait: See `StaticBatcher`.
        session: See `StaticBatcher`; None is none.

    Raises:
        TersorError: If a session and continuous batching are asked for.
    """
    if name not in ("auto", "continuous", "static"):
        raise TersorError(f"batching={name!r} must be 'auto', 'continuous' or 'static'")
    if name == "continuous" and session is not None:
        raise TersorError("a cache method needs batching='static': continuous batching has a cache of its own")
    if name == "static" or session is not None:
        return StaticBatcher(host, places=places, wait=wait, session=session or nullcontext)
    try:
        ours = GenerationConfig(do_sample=False, eos_token_id=-1)
        with continuous_batching(
            host, num_blocks=4, max_batch_tokens=PAGE, page_size=PAGE, generation_config=ours
        ) as batch:
            batch.let_requests_draw()
    except (TersorError, ExpertBusyError, ValueError):
        if name == "continuous":
            raise
        return StaticBatcher(host, places=places, wait=wait)
    return ContinuousBatcher(host, places=places, tokens=tokens, step_tokens=step_tokens)

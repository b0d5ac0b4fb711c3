"""Between requests and the batch: a queue, experts that are loaded beside what runs, and a batch that is restarted.

Whatever happens to a batch, a request that was let in gets its last event, and the expert that it held is free again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tersor._errors import TersorError
from tersor.experts.config import ExpertBusyError, UnknownExpertError
from tersor.experts.host import ExpertHost
from tersor.experts.server.jobs import Failure, Job
from tersor.experts.server.sampling import NotFiniteError
from tersor.experts.server.waiting import Waiting

LOG = logging.getLogger(__name__)
#: Seconds between looks at a batch that says nothing.
LOOK = 0.25
#: Seconds before a batch is started again: the first wait, and the longest, after so many faults in a row.
BACKOFF = (0.1, 5.0)


class QueueFullError(RuntimeError):
    """More requests wait than the server lets wait."""


class BatchStoppedError(RuntimeError):
    """The thread that runs the batch is no more."""


class Batcher(Protocol):
    """Runs the model for many requests at once."""

    @property
    def places(self) -> int:
        """Requests that it runs at once at most."""

    @property
    def limit(self) -> int:
        """Tokens of a request at most, its answer included."""

    def run(self, engine: Engine) -> None:
        """Take jobs from the engine and answer them until it closes; any error ends it, and it is started again."""

    def cancel(self, job: Job) -> None:
        """Spare a job that runs any further work; what it wrote so far may be told twice or not."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How requests are let in.

    Args:
        max_queue: Requests that wait at most.
        max_experts: Different experts in a batch at most.
        patience: Seconds after which nobody passes a request that waits.
    """

    max_queue: int = 256
    max_experts: int = 4
    patience: float = 5.0

    def __post_init__(self) -> None:
        if self.max_queue < 1 or self.max_experts < 1:
            raise TersorError(f"max_queue={self.max_queue} and max_experts={self.max_experts} must be at least 1")
        if self.patience < 0:
            raise TersorError(f"patience={self.patience} must not be negative")


class Engine:
    """Runs a batcher in a thread of its own; a context in which requests are answered.

    Args:
        host: The experts.
        batcher: What runs the model.
        settings: How requests are let in.
    """

    def __init__(self, host: ExpertHost, batcher: Batcher, settings: EngineSettings | None = None) -> None:
        self.host, self.batcher, self.settings = host, batcher, settings or EngineSettings()
        self.changed = threading.Condition()
        self.waiting = Waiting(max_experts=self.settings.max_experts, patience=self.settings.patience)
        self.running: dict[Job, bool] = {}
        """Jobs of the batch, and whether each holds its expert."""
        self.restarts = 0
        self.closing = False
        self.broken: dict[str, int] = {}
        """Experts that computed no numbers, with the generation of the content that did."""
        self._alive = False
        self._loading: set[str] = set()
        self._no_room: dict[str, int] = {}
        """Experts that found no room, and how many jobs had ended when they looked."""
        self.ends = 0
        """Jobs that are no more in a batch."""
        self._loaders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="load")
        self._thread = threading.Thread(target=self._supervise, name="batch", daemon=True)

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Fail what is left and end the thread."""
        with self.changed:
            self.closing = True
            left = [*self.waiting.jobs, *self.running]
            self.waiting.jobs = []
            self.changed.notify_all()
        for job in left:
            job.finish(Failure(503, "shutting_down", "the server is shutting down; try again later"))
        self._thread.join()
        self._loaders.shutdown(cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether a batch runs, so that requests get answers."""
        return self._alive and self._thread.is_alive()

    # ---- for the API ------------------------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let all of these wait for their turn, or none of them.

        Raises:
            QueueFullError: If too many wait.
            BatchStoppedError: If the engine closes.
        """
        with self.changed:
            if self.closing:
                raise BatchStoppedError("the server is shutting down; try again later")
            if len(self.waiting.jobs) + len(jobs) > self.settings.max_queue:
                raise QueueFullError(f"{len(self.waiting.jobs)} requests wait already; try again in a second")
            self.waiting.jobs += jobs
            for name in {job.expert for job in jobs} - {None}:
                self._ready(str(name))  # so that a load begins now
            self.changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Spare an answer that nobody waits for any more."""
        job.over = True
        with self.changed:
            if job in self.waiting.jobs:
                self.waiting.jobs.remove(job)
                return
            runs = job in self.running
        if runs:
            self.batcher.cancel(job)

    def users(self, name: str) -> list[Job]:
        """Jobs of an expert that wait or run."""
        with self.changed:
            return [job for job in (*self.waiting.jobs, *self.running) if job.expert == name]

    # ---- for the batcher --------------------------------------------------------------------------------------------

    def started(self) -> None:
        """The batch runs."""
        self._alive = True

    def take(self, places: int, seconds: float) -> list[Job]:
        """Jobs whose turn it is, their experts held; waits so long for the first one."""
        deadline = time.monotonic() + seconds
        with self.changed:
            while True:
                jobs = self._turn(places)
                left = deadline - time.monotonic()
                if jobs or self.closing or left <= 0:
                    return jobs
                self.changed.wait(left)

    def ended(self, job: Job) -> None:
        """A job is no more in the batch; one that was told nothing as its last event is told so."""
        with self.changed:
            held = self.running.pop(job, False)
        if held and job.expert is not None:
            self.host.release(job.expert)
        with self.changed:
            self.ends += 1  # there may be room now
            self.changed.notify_all()
        job.finish(Failure(503, "batch_stopped", "the batch stopped before this answer was complete; try again"))

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _turn(self, places: int) -> list[Job]:
        def ready(job: Job) -> bool | None:
            return job.expert is None or self._ready(job.expert)

        names = [job.expert for job in self.running]
        found = self.waiting.take(places, names, ready, time.monotonic())
        jobs = []
        for job in found:
            try:
                if job.expert is not None:
                    self.host.hold(job.expert)  # it is on the device, so this reads nothing
            except (TersorError, ExpertBusyError) as error:
                job.finish(Failure(503, "expert_gone", str(error), "model"))
                continue
            self.running[job] = True
            jobs.append(job)
        return jobs

    def _ready(self, name: str) -> bool | None:
        """Whether an expert is on the device; None if there is no room. Begins to load one that is not."""
        try:
            there = self.host.tier(name) == "device"
        except UnknownExpertError:
            return True  # it was unloaded meanwhile, which holding it will say
        idle = name not in self._loading and self._no_room.get(name) != self.ends
        if not there and idle and not self.closing:
            self._loading.add(name)
            self._loaders.submit(self._load, name, self.ends)
        return True if there else None if name in self._no_room else False

    def _load(self, name: str, ends: int) -> None:
        """Bring an expert to the device; ``ends`` is how many jobs had ended before."""
        failure = None
        try:
            self.host.hold(name)
            self.host.release(name)
        except ExpertBusyError as error:
            with self.changed:
                if self.running or self._loading - {name}:  # who holds the room will leave it
                    self._no_room[name] = ends
                else:
                    failure = Failure(503, "out_of_memory", str(error), "model")
        except UnknownExpertError as error:
            failure = Failure(503, "expert_gone", str(error), "model")
        except Exception as error:
            LOG.error("expert %s could not be loaded: %s", name, error)
            short = is_out_of_memory(error)
            why = f"there is no memory for expert {name!r}: {error}" if short else f"expert {name!r}: {error}"
            failure = Failure(503, "out_of_memory" if short else "expert_unreadable", why, "model")
        with self.changed:
            self._loading.discard(name)
            if failure is not None or self.host.list_experts().get(name) == "device":
                self._no_room.pop(name, None)
            lost = [job for job in self.waiting.jobs if failure and job.expert == name]
            self.waiting.jobs = [job for job in self.waiting.jobs if job not in lost]
            self.changed.notify_all()
        for job in lost:
            assert failure is not None  # it was lost to it
            job.finish(failure)

    def _supervise(self) -> None:
        wait = BACKOFF[0]
        while not self.closing:
            began = time.monotonic()
            try:
                self.batcher.run(self)
            except BaseException as error:  # a thread that was killed must come back too
                began_at_all, self._alive = self._alive, False
                self.restarts += 1
                LOG.error("the batch stopped: %s: %s", type(error).__name__, error)
                self._drop(error)
                if not began_at_all:
                    self._drop_waiting(error)
                wait = BACKOFF[0] if time.monotonic() - began > BACKOFF[1] else min(2 * wait, BACKOFF[1])
                with self.changed:
                    self.changed.wait_for(lambda: self.closing, wait)
        self._alive = False
        self._drop(None)

    def _drop(self, error: BaseException | None) -> None:
        """End what ran: it is told to try again, but for those whose expert computes no numbers by itself."""
        with self.changed:
            jobs = list(self.running)
        if isinstance(error, NotFiniteError):
            self._find_broken({job.expert: job for job in jobs if job.expert is not None})
        for job in jobs:
            if (failure := self.refused(job.expert)) is not None:
                job.finish(failure)
            self.ended(job)

    def _drop_waiting(self, error: BaseException) -> None:
        """Tell those who wait for a batch that could not even start."""
        with self.changed:
            jobs, self.waiting.jobs = self.waiting.jobs, []
        for job in jobs:
            job.finish(Failure(503, "no_batch", f"no batch could be started: {error}; try again"))

    def _find_broken(self, suspects: dict[Any, Job]) -> None:
        """Ask each expert alone: tokens of a batch are in one row, where a number that is none spreads to all."""
        for name, job in suspects.items():
            with suppress(TersorError, ExpertBusyError), torch.inference_mode(), self.host.use(name) as model:
                ids = torch.tensor([list(job.prompt)], device=model.device)
                if not torch.isfinite(model(ids).logits[0, -1].amax()):
                    self.mark_broken(name)

    def mark_broken(self, name: str | None) -> None:
        """Ask an expert no more, as long as it has the content that it has; the base is asked on."""
        if name is not None:
            self.broken[name] = self.host.generation(name)

    def refused(self, name: str | None) -> Failure | None:
        """Why an expert is not asked any more, None if it is."""
        if name is None or name not in self.broken:
            return None
        with suppress(UnknownExpertError):
            if self.host.generation(name) == self.broken[name]:
                return Failure(
                    500, "expert_not_finite", f"expert {name!r} computed numbers that are none; pack it anew", "model"
                )
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, as Python, CUDA and torch's CPU allocator each say it."""
    told = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    return told or isinstance(error, (MemoryError, torch.OutOfMemoryError))

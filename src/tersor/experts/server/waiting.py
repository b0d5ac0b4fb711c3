"""Who is next: first come, first served, but few experts at a time, because each adds the traffic of its weights.

A request passes another one only while that one is young: behind one that has waited too long and still finds no
place nobody is let in, so the experts that hold its place run dry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tersor.experts.server.jobs import Job


class Waiting:
    """The queue of requests that no batch has taken yet; its owner's lock guards it.

    Args:
        max_experts: Different experts in a batch at most; the base is none.
        patience: Seconds after which nobody passes a request any more.
    """

    def __init__(self, *, max_experts: int, patience: float) -> None:
        self.max_experts, self.patience = max_experts, patience
        self.jobs: list[Job] = []

    def take(
        self, places: int, running: Iterable[str | None], ready: Callable[[Job], bool | None], now: float
    ) -> list[Job]:
        """Remove those whose turn it is.

        Args:
            places: How many at most.
            running: Experts of the batch as it is.
            ready: Whether a request's expert is there; False if it is on its way, None if there is no room for it.
            now: The time, as `Job.came` has it.
        """
        experts = {name for name in running if name is not None}
        taken: list[Job] = []
        for job in self.jobs:
            if len(taken) >= places:
                break
            fits = job.expert is None or job.expert in experts or len(experts) < self.max_experts
            there = ready(job) if fits else None
            if there:
                taken.append(job)
                experts |= set() if job.expert is None else {job.expert}
            elif there is None and now - job.came > self.patience:
                break
        self.jobs = [job for job in self.jobs if job not in taken]
        return taken

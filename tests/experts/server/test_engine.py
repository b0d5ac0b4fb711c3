"""The engine with a batch that does what a test says: loads, faults, and what is told to whom."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import NAMES, make_host

from tersor.experts.host import ExpertHost
from tersor.experts.server import engine as under_test
from tersor.experts.server.engine import (
    BatchStoppedError,
    Engine,
    EngineSettings,
    QueueFullError,
    is_out_of_memory,
)
from tersor.experts.server.jobs import Ended, Event, Failure, Job
from tersor.experts.server.sampling import Sampling


class Puppet:
    """A batch that ends jobs when it is told to."""

    places, limit = 4, 512

    def __init__(self, on_take: Callable[[list[Job]], None] | None = None) -> None:
        self.on_take = on_take
        self.taken: list[Job] = []
        self.let_go = threading.Event()
        self.cancelled: list[Job] = []

    def run(self, engine: Engine) -> None:
        engine.started()
        while not engine.closing:
            jobs = engine.take(self.places - len(engine.running), 0.02)
            self.taken += jobs
            if jobs and self.on_take:
                self.on_take(jobs)
            if self.let_go.is_set():
                for job in list(engine.running):
                    job.finish(Ended("stop"))
                    engine.ended(job)

    def cancel(self, job: Job) -> None:
        self.cancelled.append(job)


class Told:
    """Jobs and what was told of them."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ends = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if not hasattr(event, "token"):
            self.ends.set()

    @property
    def last(self) -> Any:
        assert self.ends.wait(10), "nothing was told"
        return self.events[-1]


def ask(engine: Engine, *experts: str | None) -> list[tuple[Job, Told]]:
    made = []
    for expert in experts:
        told = Told()
        made.append((Job([3, 4], expert, Sampling(), 4, frozenset(), told), told))
    engine.submit([job for job, _ in made])
    return made


def held(host: ExpertHost) -> dict[str, int]:
    return {entry.name: entry.running for entry in host._bank.entries() if entry.running}


def soon(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


@pytest.fixture
def host(bank: Path) -> Iterator[ExpertHost]:
    made = make_host(bank)
    yield made
    assert held(made) == {}
    made.close()


def test_an_expert_is_held_while_its_requests_run_and_free_after_them(host: ExpertHost) -> None:
    puppet = Puppet()
    with Engine(host, puppet) as engine:
        asked = ask(engine, "add", "add", None, "sort")
        assert soon(lambda: len(puppet.taken) == 4)
        assert held(host) == {"add": 2, "sort": 1}
        puppet.let_go.set()
        assert [told.last for _, told in asked] == [Ended("stop")] * 4
        assert soon(lambda: not held(host))


def test_one_more_expert_than_a_batch_has_waits(host: ExpertHost) -> None:
    for name in NAMES:  # so that all are there
        host.hold(name)
        host.release(name)
    puppet = Puppet()
    with Engine(host, puppet, EngineSettings(max_experts=2)) as engine:
        asked = ask(engine, "add", "sort", "shift", "add")
        assert soon(lambda: len(puppet.taken) == 3)
        assert [job.expert for job in puppet.taken] == ["add", "sort", "add"]
        puppet.let_go.set()
        assert all(told.last == Ended("stop") for _, told in asked)


def test_a_load_holds_no_other_expert_up(host: ExpertHost, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, place = threading.Event(), host._bank._place

    def slow(delta: Any) -> Any:
        assert threading.current_thread().name.startswith("load") and go_on.wait(20)
        return place(delta)

    host.hold("add")
    host.release("add")
    monkeypatch.setattr(host._bank, "_place", slow)
    puppet = Puppet()
    puppet.let_go.set()
    with Engine(host, puppet, EngineSettings(patience=0)) as engine:
        (_, cold), (_, warm), (_, base) = ask(engine, "sort", "add", None)
        assert (warm.last, base.last) == (Ended("stop"), Ended("stop")) and not cold.events
        go_on.set()
        assert cold.last == Ended("stop")


def test_a_request_without_room_for_its_expert_waits_for_it(bank: Path) -> None:
    host = make_host(bank, max_resident=1)
    puppet = Puppet()
    with Engine(host, puppet, EngineSettings(patience=0.05)) as engine:
        ask(engine, "add")
        assert soon(lambda: len(puppet.taken) == 1)
        ((_, told),) = ask(engine, "sort")
        time.sleep(0.2)
        ask(engine, "add", "add")  # they would keep its place for ever
        time.sleep(0.1)
        assert len(puppet.taken) == 1 and not told.events
        puppet.let_go.set()
        assert told.last == Ended("stop")
    assert [job.expert for job in puppet.taken][:2] == ["add", "sort"]
    host.close()


def test_a_load_that_fails_is_told_and_the_others_go_on(host: ExpertHost, monkeypatch: pytest.MonkeyPatch) -> None:
    place = host._bank._place
    faults = {"add": torch.OutOfMemoryError("20 bytes"), "sort": OSError("gone")}

    def failing(delta: Any) -> Any:
        name = next(each.name for each in host._bank.entries() if each.running and each.resident is None)
        if name in faults:
            raise faults[name]
        return place(delta)

    monkeypatch.setattr(host._bank, "_place", failing)
    puppet = Puppet()
    puppet.let_go.set()
    with Engine(host, puppet) as engine:
        for name, code in (("add", "out_of_memory"), ("sort", "expert_unreadable")):
            ((_, told),) = ask(engine, name)
            assert isinstance(told.last, Failure) and (told.last.status, told.last.code) == (503, code)
        ((_, told),) = ask(engine, "shift")
        assert told.last == Ended("stop")
        faults.clear()
        ((_, told),) = ask(engine, "add")
        assert told.last == Ended("stop"), "memory may be there again"


def test_an_expert_that_fits_nowhere_is_told(bank: Path) -> None:
    host = make_host(bank, max_resident_bytes=10)
    with Engine(host, Puppet()) as engine:
        ((_, told),) = ask(engine, "add")
        assert told.last.code == "out_of_memory" and "10" not in host.list_experts().values()
    host.close()


@pytest.mark.parametrize("fault", [RuntimeError("broken"), SystemExit(), KeyboardInterrupt()])
def test_a_batch_that_dies_fails_what_ran_and_comes_back(host: ExpertHost, fault: BaseException) -> None:
    dies = True

    def take(jobs: list[Job]) -> None:
        if dies:
            raise fault

    puppet = Puppet(take)
    with Engine(host, puppet) as engine:
        ((_, told),) = ask(engine, "add")
        assert (told.last.status, told.last.code) == (503, "batch_stopped")
        assert soon(lambda: not held(host))
        dies = False
        puppet.let_go.set()
        ((_, told),) = ask(engine, "add")
        assert told.last == Ended("stop")
        assert engine.restarts == 1 and engine.alive


def test_a_batch_that_cannot_start_is_tried_again_less_and_less_often(
    host: ExpertHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "BACKOFF", (0.02, 0.2))
    starts: list[float] = []

    class Never(Puppet):
        def run(self, engine: Engine) -> None:
            starts.append(time.monotonic())
            raise RuntimeError("no memory")

    with Engine(host, Never()) as engine:
        assert soon(lambda: len(starts) >= 7)
        assert not engine.alive
        ((_, told),) = ask(engine, None)
        assert told.last.code == "no_batch"
    waits = [later - before for before, later in pairwise(starts)]
    assert waits[1] >= 0.04 and waits[3] >= 0.16 and waits[5] >= 0.19


def test_a_full_queue_takes_all_of_a_request_or_nothing(host: ExpertHost) -> None:
    puppet = Puppet()
    puppet.places = 0
    with Engine(host, puppet, EngineSettings(max_queue=3)) as engine:
        asked = ask(engine, None, None)
        with pytest.raises(QueueFullError):
            ask(engine, None, None)
        ask(engine, None)
        assert len(engine.waiting.jobs) == 3
        engine.cancel(asked[0][0])
        assert len(engine.waiting.jobs) == 2 and not asked[0][1].events
    assert asked[1][1].last.code == "shutting_down"
    with pytest.raises(BatchStoppedError):
        ask(engine, None)


def test_a_job_that_runs_is_cancelled_in_its_batch(host: ExpertHost) -> None:
    puppet = Puppet()
    with Engine(host, puppet) as engine:
        ((job, told),) = ask(engine, "add")
        assert soon(lambda: bool(puppet.taken))
        engine.cancel(job)
        assert puppet.cancelled == [job]
        puppet.let_go.set()
        assert soon(lambda: not held(host)) and told.events == []


def test_users_are_those_who_wait_and_who_run(host: ExpertHost) -> None:
    puppet = Puppet()
    puppet.places = 1
    with Engine(host, puppet) as engine:
        ask(engine, "add", "add", "sort")
        assert soon(lambda: bool(puppet.taken))
        assert [len(engine.users(name)) for name in NAMES] == [2, 0, 0, 1]


def test_settings_that_are_impossible_are_refused() -> None:
    for settings in ({"max_queue": 0}, {"max_experts": 0}, {"patience": -1}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            EngineSettings(**settings)


def test_memory_is_short_as_each_library_says_it() -> None:
    told = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
    assert is_out_of_memory(RuntimeError(told)) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError()) and not is_out_of_memory(RuntimeError("shapes"))

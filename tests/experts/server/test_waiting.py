"""Who is next."""

from __future__ import annotations

from tersor.experts.server.jobs import Job
from tersor.experts.server.sampling import Sampling
from tersor.experts.server.waiting import Waiting


def queue(*experts: str | None, came: float = 0.0, **settings: float) -> Waiting:
    made = Waiting(**{"max_experts": 2, "patience": 5.0, **settings})  # type: ignore[arg-type]
    made.jobs = [Job([1], name, Sampling(), 1, frozenset(), lambda _: None, came=came) for name in experts]
    return made


def taken(
    made: Waiting, places: int = 9, running: tuple[str | None, ...] = (), now: float = 1.0, **ready: bool | None
) -> list[str | None]:
    return [job.expert for job in made.take(places, running, lambda job: ready.get(str(job.expert), True), now)]


def test_first_come_first_served_up_to_the_places() -> None:
    made = queue("a", None, "b", "a")
    assert taken(made, places=3) == ["a", None, "b"]
    assert [job.expert for job in made.jobs] == ["a"]


def test_a_batch_has_few_experts_and_the_base_is_none() -> None:
    assert taken(queue("a", "b", "c", None, "a")) == ["a", "b", None, "a"]
    assert taken(queue("c", "a"), running=("a", "b", None)) == ["a"]


def test_an_expert_that_is_on_its_way_holds_nobody_up() -> None:
    made = queue("a", "b", "a")
    assert taken(made, now=100.0, a=False) == ["b"]
    assert [job.expert for job in made.jobs] == ["a", "a"]


def test_nobody_passes_a_request_that_has_waited_too_long() -> None:
    """So that its place becomes free: the batch runs dry of the experts that hold it."""
    assert taken(queue("c", "a", None), running=("a", "b"), now=4.9) == ["a", None]
    assert taken(queue("c", "a", None), running=("a", "b"), now=5.1) == []
    assert taken(queue("c", "a", None), now=5.1, c=None) == [], "there is no room for it on the device"
    assert taken(queue("c", "a", None), running=("a",), now=5.1) == ["c", "a", None]

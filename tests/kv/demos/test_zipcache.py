"""ZipCache's demo: the headline's claim, and a verdict that follows from the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_demos import run_demo

from tersor.kv.bench.recall import Scores
from tersor.kv.bench.tasks import PLANTED
from tersor.kv.demos import zipcache
from tersor.kv.demos.zipcache import FULL, OURS, SHOWN, time_paired


def records(ours: int, peer: int) -> list:
    """Of 100 right answers of the full cache."""

    def scores(right: int) -> Scores:
        return Scores([1.0] * right + [0.0] * (700 - right), 100, 400)

    recall = {name: scores(peer) for name in SHOWN}
    recall[FULL], recall[OURS] = scores(700), scores(ours)
    return zipcache._records(recall, recall, time_paired({"full": list, "ZipCache": list}, repeats=3))


@pytest.mark.parametrize(
    ("ours", "peer", "verdict"),
    [(700, 60, "holds"), (700, 700, "partly"), (697, 60, "too few to tell"), (600, 60, "fails")],
)
def test_the_verdict_follows_from_the_numbers(ours: int, peer: int, verdict: str) -> None:
    """Three lost may be more than half a point of 700, or less."""
    assert records(ours, peer)[0].verdict == verdict


def test_the_headline_is_the_paper_s() -> None:
    assert records(700, 60)[0].claim == -0.38


def test_the_demo_says_what_it_saved_and_what_it_cost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, page = run_demo("zipcache", monkeypatch, tmp_path)
    assert {"accuracy against the full cache", "compression of a 16-bit cache"} <= {each.quantity for each in found}
    assert found[0].n == 2 * len(PLANTED) and all(task.replace("_", " ") in page for task in zipcache.SHOWN_TASKS)

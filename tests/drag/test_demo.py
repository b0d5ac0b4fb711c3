"""The demo's verdict, and one run of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_demos import run_demo

from tersor.bench.measure import Estimate
from tersor.drag.demo import judge


def test_the_demo_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records, page = run_demo("draganything", monkeypatch, tmp_path)
    first = records[0]
    assert first.model == "tiny-drag" and first.peer_name == "still picture"
    assert {each.item for each in records[3:]} == {
        f"scene: {kind}" for kind in ("start", "together", "crossing", "camera")
    }
    cost = next(each for each in records if each.quantity == "operations of a video")
    assert cost.measured is not None and 1 < cost.measured < 2
    assert "is no video model" in page and page.count("data:image/gif") == 12


def interval(low: float, value: float, high: float) -> Estimate:
    return Estimate(value, low, high, "95% bootstrap")


def test_the_verdict_wants_the_papers_share_and_more_than_a_still_picture() -> None:
    better = interval(0.5, 1.0, 1.5)
    assert judge(interval(0.26, 0.4, 0.5), better) == "holds"
    assert judge(interval(0.2, 0.4, 0.5), better) == "partly", "the interval reaches below the claim"
    assert judge(interval(0.3, 0.4, 0.5), interval(-0.1, 0.2, 0.5)) == "partly", "a still picture may be as good"
    assert judge(interval(-0.2, -0.1, 0.1), better) == "too few to tell"
    assert judge(interval(-0.2, -0.1, 0.0), better) == "fails"
    assert judge(interval(0.3, 0.4, 0.5), interval(-0.5, -0.2, -0.1)) == "fails", "a still picture is better"

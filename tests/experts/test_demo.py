"""ME-Switch's demo: the paper's ratios from configurations, and verdicts by faked answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from small_demos import run_demo

from tersor.bench.measure import wilson_interval
from tersor.experts import demo
from tersor.experts.bench.quality import BASE, LSQ, Kept
from tersor.experts.bench.routing import ENCODER, NGRAMS


def kept(right: int, divergence: float = 0.1) -> Kept:
    """Of 1,000 prompts that the expert all answers right."""
    return Kept([True] * right + [False] * (1000 - right), [True] * 1000, [divergence] * 1000, 1000)


def records(ours: int, naive: int) -> list:
    rows = {
        demo.OURS: kept(ours), demo.NAIVE: kept(naive), f"{LSQ}, k=0": kept(0, 0.6), f"{LSQ}, k=2": kept(0, 0.2),
    }  # fmt: skip
    routes = {
        who: SimpleNamespace(accuracy=wilson_interval(hits, 10), n=10) for who, hits in ((ENCODER, 9), (NGRAMS, 5))
    }
    return demo._records(rows, routes)


@pytest.mark.parametrize(
    ("ours", "naive", "verdict"),
    [(1000, 50, "holds"), (997, 50, "holds"), (1000, 1000, "partly"), (990, 50, "too few to tell"), (750, 50, "fails")],
)
def test_a_point_may_be_lost_and_the_naive_quantizer_must_lose_more(ours: int, naive: int, verdict: str) -> None:
    first, distance, *_ = records(ours, naive)
    assert first.verdict == verdict
    assert (first.measured, first.peer) == (pytest.approx((ours - 1000) / 10), (naive - 1000) / 10)
    assert distance.measured == pytest.approx(3.0)


def test_ratios_of_the_paper_follow_from_configurations() -> None:
    with_router, without, routed = records(1000, 50)[2:]
    assert [each.verdict for each in (with_router, without)] == ["holds", "holds"]
    assert with_router.measured == pytest.approx(1.74, abs=0.005) and without.measured == pytest.approx(2.04, abs=0.005)
    assert (routed.measured, routed.peer, routed.unit) == (90.0, 50.0, "%")


def test_another_ratio_than_the_paper_s_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "mistral_ratio", lambda router: 1.6)
    assert [each.verdict for each in records(1000, 50)[2:4]] == ["fails", "fails"]


def test_the_demo_packs_an_expert_in_several_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, page = run_demo("meswitch", monkeypatch, tmp_path)
    assert found[0].n == 8
    assert all(row in page for row in demo.SHOWN if row != BASE)

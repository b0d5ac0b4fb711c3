"""ZipR1's demo compares the model before and after its training, and its verdict can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_demos import run_demo

from tersor.bench.measure import PairedTimes
from tersor.kv.bench.vision import DENSE, Outcome
from tersor.rl import demo
from tersor.rl.demo import AFTER, BEFORE, RANDOM, TAU


def outcome(right: int, ratio: float) -> Outcome:
    """``right`` of 1,000 answers."""
    answers = [1.0] * right + [0.0] * (1000 - right)
    return Outcome(
        first=answers, second=answers, kinds=["look"] * 1000, ratios=[ratio] * 1000, flops=1000 * (1 - ratio**2),
        kv_bytes=int(1000 * ratio), dense_bytes=1000,
    )  # fmt: skip


def records(*, right: int = 1000, ratio: float = 0.3, random: int = 500, dense: int = 1000) -> list:
    """Of a model that was right 1,000 times from 0.8 of the tokens before."""
    times = PairedTimes({DENSE: (4.0, 4.0), BEFORE: (8.0, 8.0), AFTER: (2.0, 2.0)})
    results = {
        (BEFORE, TAU): outcome(1000, 0.8), (BEFORE, 1.0): outcome(1000, 1.0), (AFTER, TAU): outcome(right, ratio),
        (AFTER, 1.0): outcome(dense, 1.0), (AFTER, RANDOM): outcome(random, ratio),
    }  # fmt: skip
    return demo._records(results, times, times)


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, "holds"),
        ({"ratio": 0.5}, "partly"),
        ({"ratio": 0.9}, "fails"),
        ({"right": 998}, "holds"),
        ({"right": 990}, "too few to tell"),
        ({"right": 850}, "fails"),
        ({"random": 1000}, "partly"),
    ],
)
def test_the_headline_needs_fewer_tokens_the_same_answers_and_random_tokens_that_fail(
    given: dict[str, float], verdict: str
) -> None:
    first = records(**given)[0]
    assert first.verdict == verdict
    assert first.measured == pytest.approx((given.get("right", 1000) - 1000) / 10)
    assert first.peer == (given.get("random", 500) - 1000) / 10


def test_what_it_costs_and_saves_stands_beside_the_start() -> None:
    found = {(each.item, each.quantity): each for each in records(dense=750)}
    assert found["read densely", "accuracy against before the training"].measured == -25
    kept = found["tau=0.975: the same prompts", "tokens in attention"]
    assert (kept.measured, kept.baseline, kept.claim) == (pytest.approx(0.3), pytest.approx(0.8), 0.247)
    prefill = found["tau=0.975: prefill, one prompt", "speed-up against dense attention"]
    assert (prefill.measured, prefill.peer) == (2.0, 0.5)


def test_the_demo_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, page = run_demo("zipr1", monkeypatch, tmp_path)
    kept = next(each for each in found if each.quantity == "tokens in attention")
    assert 0 < kept.measured < kept.baseline < 1
    assert "before and after the training" in page

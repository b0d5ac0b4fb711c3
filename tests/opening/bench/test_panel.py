"""Runs of the mixed panel that are drawn from judged battles."""

from __future__ import annotations

import numpy as np
import pytest

from tersor.opening.bench.panel import simulate


def battles(right: float, n: int = 400) -> list[list[float]]:
    """Half of them won by the first answer; the judge is right in a share, and equally sure of all."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(n):
        won, said = number % 2 == 0, rng.random() < right
        found.append([0.9 if won == said else 0.1, float(won), float(said)])
    return found


def test_a_good_judge_is_worth_many_votes_and_the_interval_covers() -> None:
    found = simulate(battles(0.98))
    assert found.agreement == pytest.approx(0.98, abs=0.02)
    assert 0.92 <= found.coverage.value <= 0.98
    assert found.shorter > 0.5 and found.worth > 400


def test_a_judge_that_guesses_is_worth_nothing() -> None:
    found = simulate(battles(0.5))
    assert abs(found.shorter) < 0.05 and 0.9 <= found.coverage.value <= 0.98

"""Every rule by faked figures: a win, a tie, a loss, too few cases, and an alternative that is as good or better."""

from __future__ import annotations

import pytest

from tersor.bench.measure import Estimate
from tersor.bench.records import VERDICTS
from tersor.bench.verdicts import judge_above, judge_at_least, judge_points, judge_speed_up


def between(low: float, high: float) -> Estimate:
    return Estimate((low + high) / 2, low, high, "95% bootstrap")


AHEAD, EVEN, BEHIND = between(1, 9), between(-3, 4), between(-9, -1)


@pytest.mark.parametrize(
    ("low", "high", "ahead", "verdict"),
    [
        (5, 7, None, "holds"),
        (5, 7, AHEAD, "holds"),
        (5, 7, EVEN, "partly"),  # the alternative may be as good
        (5, 7, BEHIND, "fails"),
        (4.9, 7, None, "too few to tell"),
        (4.9, 7, AHEAD, "too few to tell"),
        (1, 4.9, None, "fails"),
        (1, 4.9, AHEAD, "fails"),
        (1, 5, None, "too few to tell"),
    ],
)
def test_the_whole_interval_decides(low: float, high: float, ahead: Estimate | None, verdict: str) -> None:
    assert judge_at_least(between(low, high), 5, ahead=ahead) == verdict
    assert verdict in VERDICTS


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.5, 2.0, "holds"),
        (1.4, 2.0, "partly"),  # faster for sure, but by how much
        (1.1, 1.3, "partly"),
        (1.0, 2.0, "too few to tell"),
        (0.9, 1.1, "too few to tell"),
        (0.7, 1.0, "fails"),
    ],
)
def test_a_speed_up_is_all_of_it_some_or_none(low: float, high: float, verdict: str) -> None:
    assert judge_speed_up(between(low, high), 3.0, least=0.5) == verdict


@pytest.mark.parametrize(
    ("n", "verdict"), [(299, "too few to tell"), (300, "holds"), (30, "too few to tell"), (3000, "holds")]
)
def test_answers_that_are_all_alike_say_as_much_as_there_are_of_them(n: int, verdict: str) -> None:
    """Resampling equal answers gives an interval without width; up to 3 in n may differ elsewhere."""
    assert judge_points(between(0, 0), n, allowed=1.0, ahead=AHEAD) == verdict


def test_points_below_the_margin_fail_and_spread_is_left_as_it_is() -> None:
    assert judge_points(between(-4, -1.5), 30, allowed=1.0, ahead=AHEAD) == "fails"
    assert judge_points(between(-0.9, 0.2), 30, allowed=1.0, ahead=AHEAD) == "holds"
    assert judge_points(between(-0.9, 0.2), 30, allowed=1.0, ahead=BEHIND) == "fails"


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(6, 9, "holds"), (5, 9, "too few to tell"), (1, 4, "too few to tell"), (1, 2, "fails")]
)
def test_one_of_two_measurements_is_larger(low: float, high: float, verdict: str) -> None:
    assert judge_above(between(low, high), between(3, 5)) == verdict

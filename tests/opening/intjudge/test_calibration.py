"""Temperature and reliability, on judges whose calibration is known."""

from __future__ import annotations

import numpy as np
import pytest

from tersor._errors import TersorError
from tersor.opening.intjudge.calibration import calibration_error, chance_of_first, fit_temperature, reliability


def judge(n: int, factor: float, seed: int = 0):
    """Scores of a judge that knows its probabilities, times ``factor``, and who won."""
    rng = np.random.default_rng(seed)
    exact = np.log(rng.dirichlet((1, 1, 1, 1), n))
    wins = rng.random(n) < chance_of_first(exact)
    return factor * exact, wins.tolist()


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_what_made_a_judge_too_sure(factor: float) -> None:
    assert fit_temperature(*judge(6_000, factor)) == pytest.approx(factor, rel=0.1)


def test_a_temperature_keeps_the_winner_of_two_verdicts_and_mends_the_error() -> None:
    scores, wins = judge(6_000, 3.0)
    before, after = chance_of_first(scores), chance_of_first(scores, fit_temperature(scores, wins))
    errors = [calibration_error(reliability(each, wins)) for each in (before, after)]
    assert errors[0] > 0.1 and errors[1] < 0.03
    two = np.array([[-1.0, -3.0, -60.0, -60.0]])
    assert chance_of_first(two, 5.0)[0] == pytest.approx(1 / (1 + np.exp(-2 / 5)), abs=1e-4)


def test_bins_hold_every_battle_once_and_say_how_often_the_winner_is_right() -> None:
    bins = reliability([0.95, 0.05, 0.92, 0.55, 1.0], [True, True, True, False, True])
    assert [each.n for each in bins] == [1, 4]
    assert bins[0].right.value == 0.0 and bins[1].right.value == 0.75
    assert bins[1].confidence == pytest.approx((0.95 + 0.95 + 0.92 + 1.0) / 4)
    assert calibration_error(bins) == pytest.approx((1 * 0.55 + 4 * (bins[1].confidence - 0.75)) / 5)


def test_nothing_to_fit_is_refused() -> None:
    with pytest.raises(TersorError, match="no battle"):
        fit_temperature(np.zeros((0, 4)), [])

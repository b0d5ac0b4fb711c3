"""How far a judge's probabilities can be believed: a temperature that mends them, and the reliability that is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tersor._errors import TersorError
from tersor.bench.measure import Estimate, wilson_interval
from tersor.opening.prompts import WORDS

#: Temperatures that are tried.
GRID = np.geomspace(0.1, 10.0, 401)
#: Bins of the confidence, from one half to 1.
BINS = 5
_FIRST = np.array([label in ("A", "Tie(A)") for label in WORDS.values()])
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """Battles that a judge was about equally sure of.

    Args:
        confidence: Mean probability that it gave its winner.
        right: Share of them in which that is the winner, with its interval.
        n: How many.
    """

    confidence: float
    right: Estimate
    n: int


def chance_of_first(scores: _Floats, temperature: float = 1.0) -> _Floats:
    """Probability ``[n]`` that the answer shown first is better.

    Args:
        scores: Log-probabilities ``[n, 4]`` of the verdicts in the order of `WORDS`.
        temperature: Divides them (Guo et al. 2017); above 1 makes a judge less sure.
    """
    scaled = scores / temperature
    chances = np.exp(scaled - scaled.max(1, keepdims=True))
    found: _Floats = chances[:, _FIRST].sum(1) / chances.sum(1)
    return found


def fit_temperature(scores: _Floats, first_wins: Sequence[bool]) -> float:
    """The temperature at which what happened is the most probable.

    Args:
        scores: See `chance_of_first`.
        first_wins: Whether the answer shown first won.

    Raises:
        TersorError: Without a battle.
    """
    if not len(scores):
        raise TersorError("there is no battle to fit a temperature on")
    wins = np.asarray(first_wins)
    losses = []
    for temperature in GRID:
        p = chance_of_first(scores, float(temperature))
        losses.append(-np.log(np.clip(np.where(wins, p, 1 - p), 1e-9, None)).mean())
    return float(GRID[int(np.argmin(losses))])


def reliability(chances: Sequence[float], first_wins: Sequence[bool], bins: int = BINS) -> list[Bin]:
    """Confidence against truth, in bins of equal width from one half to 1; empty ones are left out."""
    p, wins = np.asarray(chances, dtype=np.float64), np.asarray(first_wins)
    confidence, right = np.maximum(p, 1 - p), (p > 0.5) == wins
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        Bin(float(confidence[own].mean()), wilson_interval(int(right[own].sum()), int(own.sum())), int(own.sum()))
        for own in (place == each for each in range(bins))
        if own.any()
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: the mean distance of confidence and truth over battles (Naeini et al. 2015)."""
    total = sum(each.n for each in bins)
    return sum(each.n * abs(each.confidence - each.right.value) for each in bins) / total

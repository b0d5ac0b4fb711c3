"""Is the candidate as good as the baseline, up to a margin? A non-inferiority test, its power, and what votes buy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from tersor._errors import TersorError
from tersor.opening.ranking import METRICS, Tally, oriented
from tersor.opening.records import Verdict

#: Chance of a candidate at the margin to pass, and the power that the number of battles is given for.
LEVEL, POWER = 0.05, 0.8
_NORMAL = NormalDist()
_Z = _NORMAL.inv_cdf(1 - LEVEL)
#: A run so many times as long.
LONGER = (1, 2, 4, 8)


@dataclass(frozen=True)
class Comparison:
    """A candidate against a baseline; scores count a win 1, a tie one half.

    Args:
        baseline: Name of the model that is there.
        candidate: Name of the one that shall take its place.
        margin: How far below one half the candidate's score may be.
        score: Of the candidate; None without battles.
        low: One-sided 95 % lower bound of the score.
        high: One-sided 95 % upper bound.
        deviation: Standard error of the score times the root of the battles.
        tally: What the candidate did.
        instances: How many the battles are on.
    """

    baseline: str
    candidate: str
    margin: float
    score: float | None
    low: float | None
    high: float | None
    deviation: float | None
    tally: Tally
    instances: int

    @property
    def least(self) -> float:
        """What the score must be above."""
        return 0.5 - self.margin

    @property
    def verdict(self) -> Literal["pass", "fail", "inconclusive"]:
        """Pass: not worse by more than the margin. Fail: worse by more. At the margin each is wrong in 5 % of runs."""
        if self.low is not None and self.low > self.least:
            return "pass"
        return "fail" if self.high is not None and self.high < self.least else "inconclusive"

    def power(self, times: float = 1.0) -> float | None:
        """Chance to pass of a candidate that is exactly as good, in a run so many ``times`` as long."""
        if self.deviation is None:
            return None
        return _NORMAL.cdf(self.margin * math.sqrt(times * self.tally.battles) / self.deviation - _Z)

    @property
    def needed(self) -> int | None:
        """Battles for which a candidate that is exactly as good passes in 80 % of runs."""
        return None if self.deviation is None else _battles(self.margin, self.deviation)

    @property
    def needed_as_seen(self) -> int | None:
        """The same for a candidate whose true score is the one seen here; None if more battles would not help."""
        if self.score is None or self.deviation is None or self.score <= self.least:
            return None
        return _battles(self.score - self.least, self.deviation)


def compare_models(verdicts: Sequence[Verdict], baseline: str, candidate: str, *, margin: float = 0.05) -> Comparison:
    """Compare two models by the battles between them.

    The standard error is clustered by instance. One win and one loss more than were seen enter the bounds (after
    Agresti and Caffo 2000), so that a few equal verdicts prove nothing.

    Args:
        verdicts: One for each battle; those of other models are left out.
        baseline: Name of the model that is there.
        candidate: Name of the one that shall take its place.
        margin: How far below one half the candidate's score may be.

    Raises:
        TersorError: If the margin is not inside (0, 0.5), or both are the same model.
    """
    if not 0 < margin < 0.5:
        raise TersorError(f"margin={margin} must be above 0 and below 0.5")
    if baseline == candidate:
        raise TersorError(f"--baseline and --candidate are both {baseline!r}; give two models")
    tally, clusters = Tally(), dict[str, list[float]]()
    for verdict in verdicts:
        if {verdict.a, verdict.b} == {baseline, candidate}:
            tally = tally.plus(verdict, candidate)
            label = oriented(verdict, candidate).label
            clusters.setdefault(verdict.uid, []).append(1.0 if label == "A" else 0.0 if label == "B" else 0.5)
    if not clusters:
        return Comparison(baseline, candidate, margin, None, None, None, None, tally, 0)
    points, battles = METRICS["ties_half"](tally)
    groups = [*clusters.values(), [1.0], [0.0]]
    n = battles + 2
    middle = (points + 1) / n
    squares = sum(sum(score - middle for score in group) ** 2 for group in groups)
    error = math.sqrt(squares * len(groups) / (len(groups) - 1)) / n
    half = _student(len(groups) - 1) * error
    return Comparison(
        baseline, candidate, margin, points / battles, max(middle - half, 0.0), min(middle + half, 1.0),
        error * math.sqrt(battles), tally, len(clusters),
    )  # fmt: skip


def _student(freedom: int) -> float:
    """Student's t at 95 %, from that of the normal (Abramowitz and Stegun 26.7.5)."""
    z = _Z
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _battles(distance: float, deviation: float) -> int:
    return math.ceil(((_Z + _NORMAL.inv_cdf(POWER)) * deviation / distance) ** 2)

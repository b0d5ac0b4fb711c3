"""People on a random sample of battles, a judge on the rest: a score that neither a biased judge nor few votes spoil.

Prediction-powered inference (Angelopoulos, Bates, Fannjiang, Jordan and Zrnic 2023, Science 382), with the weight of
the judge tuned to the data (PPI++, Angelopoulos, Duchi and Zrnic 2023, arXiv 2311.01453), and added up over strata
(Fisch et al. 2024, arXiv 2406.04291), so that people may be asked more often where the judge doubts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tersor._errors import TersorError
from tersor.opening.ranking import oriented
from tersor.opening.records import Label, Verdict

#: Of the 95 % interval, and of a one-sided bound.
Z, ONE_SIDED = 1.959964, 1.644854
#: Votes in a stratum below which its variance says nothing.
LEAST = 10
_POINTS: dict[Label, float] = {"A": 1.0, "B": 0.0}
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Powered:
    """A mean score by people and a judge together, beside that by the same votes of people alone.

    Args:
        score: Of the candidate, from 0 to 1.
        error: Its standard error.
        alone: The mean of people's votes.
        alone_error: Its standard error.
        weight: How far the judge is followed, from 0 on; the mean over strata.
        people: Battles that people decided.
        judged: Battles that the judge alone decided.
    """

    score: float
    error: float
    alone: float
    alone_error: float
    weight: float
    people: int
    judged: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the score, by the normal approximation."""
        return self.score - Z * self.error, self.score + Z * self.error

    @property
    def bounds(self) -> tuple[float, float]:
        """One-sided 95 % bounds of the score."""
        return self.score - ONE_SIDED * self.error, self.score + ONE_SIDED * self.error

    def verdict(self, margin: float) -> Literal["pass", "fail", "inconclusive"]:
        """As of `tersor.opening.compare.Comparison`: whether the candidate is worse by no more than ``margin``."""
        low, high = self.bounds
        return "pass" if low > 0.5 - margin else "fail" if high < 0.5 - margin else "inconclusive"

    @property
    def shorter(self) -> float:
        """How much shorter the interval is than that of people alone, as a share."""
        return 1 - self.error / self.alone_error if self.alone_error else 0.0

    @property
    def worth(self) -> float:
        """Votes that people alone would need for an interval as short."""
        return self.people * (self.alone_error / self.error) ** 2 if self.error else math.inf


def powered_mean(votes: _Floats, beside: _Floats, rest: _Floats) -> tuple[float, float, float]:
    """The mean of votes from a random sample and a judge's guesses on all: ``mean(y) - w (mean(f) - mean(f'))``.

    The weight ``w = cov(y, f) / ((1 + n / N) var(f))`` makes its variance least (PPI++, Example 6.1); one below 0
    is 0, at which the judge is not heard.

    Args:
        votes: ``y [n]``, of people.
        beside: ``f [n]``, the judge's guesses of them.
        rest: ``f' [N]``, its guesses where people said nothing; may be empty.

    Returns:
        The mean, its standard error, and the weight.
    """
    n, count = len(votes), len(rest)
    if not count:
        return float(votes.mean()), math.sqrt(votes.var(ddof=1) / n), 0.0
    both = np.concatenate([beside, rest])
    spread = both.var(ddof=1)
    covariance = float(np.cov(votes, beside, ddof=1)[0, 1])
    weight = max(covariance / ((1 + n / count) * spread), 0.0) if spread else 0.0
    mean = votes.mean() - weight * (beside.mean() - rest.mean())
    variance = (
        (votes - weight * beside).var(ddof=1) / n + weight**2 * rest.var(ddof=1) / count if count > 1 else math.inf
    )
    return float(mean), math.sqrt(variance), weight


def powered_strata(strata: Sequence[tuple[_Floats, _Floats, _Floats]]) -> Powered:
    """The mean over strata, each with its share of the battles and a weight of its own.

    Args:
        strata: Votes, the judge's guesses of them, and its other guesses, as `powered_mean` takes them.
    """
    sizes = [len(votes) + len(rest) for votes, _, rest in strata]
    shares = [size / sum(sizes) for size in sizes]
    means, errors, weights = zip(*(powered_mean(*stratum) for stratum in strata), strict=True)
    people = sum(len(votes) for votes, _, _ in strata)
    return Powered(
        score=_mix(shares, means), error=_together(shares, errors),
        alone=_mix(shares, [float(votes.mean()) for votes, _, _ in strata]),
        alone_error=_together(shares, [math.sqrt(votes.var(ddof=1) / len(votes)) for votes, _, _ in strata]),
        weight=_mix(shares, weights), people=people, judged=sum(sizes) - people,
    )  # fmt: skip


def powered_score(
    people: Sequence[Verdict], judge: Sequence[Verdict], candidate: str, baseline: str, *,
    doubtful: frozenset[str] = frozenset(),
) -> Powered:  # fmt: skip
    """The candidate's score against the baseline: a win counts 1, a tie one half.

    Args:
        people: Their verdicts, on battles that were drawn at random in each stratum.
        judge: Its verdicts on all battles; its probability is its guess where it gives one.
        candidate: A model.
        baseline: Another one.
        doubtful: Ids of the battles of a stratum of their own, in which people may be asked more often.

    Raises:
        TersorError: If people decided too few battles to say how far the judge is off.
    """
    voted, guessed = _scores(people, candidate, baseline, sure=True), _scores(judge, candidate, baseline, sure=False)
    parts = [part for part in (guessed.keys() - doubtful, guessed.keys() & doubtful) if part]
    if not parts:
        raise TersorError(f"the judge decided no battle of {candidate!r} and {baseline!r}")
    strata = []
    for part in parts:
        asked, rest = sorted(part & voted.keys()), sorted(part - voted.keys())
        if len(asked) < LEAST:
            which = "that the judge doubts" if part & doubtful else "that no judge doubts"
            raise TersorError(
                f"people decided {len(asked)} of the {len(part)} battles {which}; at least {LEAST}, drawn at random "
                "(tersor opening serve --sample N), are needed to correct the judge"
            )
        y, beside, others = (
            np.array([found[each] for each in ids], dtype=np.float64)
            for found, ids in ((voted, asked), (guessed, asked), (guessed, rest))
        )
        strata.append((y, beside, others))
    return powered_strata(strata)


def _mix(shares: Sequence[float], values: Sequence[float]) -> float:
    return sum(share * value for share, value in zip(shares, values, strict=True))


def _together(shares: Sequence[float], errors: Sequence[float]) -> float:
    return math.sqrt(sum((share * error) ** 2 for share, error in zip(shares, errors, strict=True)))


def _scores(verdicts: Sequence[Verdict], candidate: str, baseline: str, *, sure: bool) -> Mapping[str, float]:
    """Battle -> the candidate's score; a judge's is its probability, if it gives one."""
    found = {}
    for verdict in verdicts:
        if {verdict.a, verdict.b} == {candidate, baseline}:
            own = oriented(verdict, candidate)
            guess = None if sure else own.probability
            found[verdict.battle] = _POINTS.get(own.label, 0.5) if guess is None else guess
    return found

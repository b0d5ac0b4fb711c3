"""What a trained judge is worth beside people: battles that were judged are drawn again many times over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tersor.bench.measure import Estimate, wilson_interval
from tersor.opening.powered import Z, powered_mean

PEOPLE, JUDGED, RUNS = 100, 1900, 500


@dataclass(frozen=True)
class Panel:
    """Many runs of a mixed panel.

    Args:
        agreement: Share of battles in which judge and people name the same winner.
        coverage: Share of runs whose 95 % interval holds the truth.
        coverage_alone: The same of people's votes alone.
        coverage_judge: The same of the judge's guesses alone.
        shorter: How much shorter the interval is than that of people alone, on average.
        worth: Votes that people alone would need, on average.
        people: Votes of a run.
        judged: Battles that the judge alone decides.
        runs: How many.
    """

    agreement: float
    coverage: Estimate
    coverage_alone: Estimate
    coverage_judge: Estimate
    shorter: float
    worth: float
    people: int = PEOPLE
    judged: int = JUDGED
    runs: int = RUNS


def simulate(battles: Sequence[Sequence[float]], seed: int = 0) -> Panel:
    """Draw runs from judged battles, whose mean is the truth.

    Args:
        battles: The judge's probability of the first answer, its points by people, and whether both name one winner.
        seed: Of the draws.
    """
    rng, known = np.random.default_rng(seed), np.asarray(battles, dtype=np.float64)
    truth = known[:, 1].mean()
    hits, ratios = np.zeros(3, dtype=int), []
    for _ in range(RUNS):
        drawn = known[rng.integers(0, len(known), PEOPLE + JUDGED)]
        guesses, votes = drawn[:, 0], drawn[:PEOPLE, 1]
        mean, error, _ = powered_mean(votes, guesses[:PEOPLE], guesses[PEOPLE:])
        alone = votes.std(ddof=1) / math.sqrt(PEOPLE)
        judge = guesses.std(ddof=1) / math.sqrt(len(guesses))
        told = ((mean, error), (votes.mean(), alone), (guesses.mean(), judge))
        hits += [abs(value - truth) <= Z * own for value, own in told]
        ratios.append(error / alone)
    coverage, coverage_alone, coverage_judge = (wilson_interval(int(each), RUNS) for each in hits)
    shorter = float(np.mean(ratios))
    return Panel(
        float(known[:, 2].mean()), coverage, coverage_alone, coverage_judge, 1 - shorter,
        PEOPLE * float(np.mean(np.square(1 / np.asarray(ratios)))),
    )  # fmt: skip

"""Intervals of shares whose cases come in groups: battles on one instance share its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

#: Resamples of a bootstrap.
RESAMPLES = 1000


class Interval(NamedTuple):
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def share(numerators: Sequence[float], denominators: Sequence[float], groups: Sequence[str], *, seed: int = 0,
          resamples: int = RESAMPLES) -> Interval | None:  # fmt: skip
    """Sum of ``numerators`` over sum of ``denominators``, with the percentile bootstrap over whole groups.

    None where the denominators sum to 0. One group alone has an interval of no width: it says nothing of others.

    Args:
        numerators: Of each case.
        denominators: Of each case; 0 leaves a case out.
        groups: What each case belongs to.
        seed: Of the resamples.
        resamples: How many.
    """
    counts = np.asarray(denominators, dtype=np.float64)
    if not counts.sum() > 0:
        return None
    _, place = np.unique(np.asarray(groups), return_inverse=True)
    above = np.bincount(place, weights=np.asarray(numerators, dtype=np.float64))
    below = np.bincount(place, weights=counts)
    draws = weights(len(above), seed=seed, resamples=resamples)
    totals = draws @ below
    found = (draws @ above)[totals > 0] / totals[totals > 0]
    value = float(above.sum() / below.sum())
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(value, min(float(low), value), max(float(high), value))


def weights(groups: int, *, seed: int, resamples: int) -> npt.NDArray[np.float64]:
    """How often each group is drawn in each resample, ``[resamples, groups]`` float64."""
    even = np.full(groups, 1 / groups)
    return np.random.default_rng(seed).multinomial(groups, even, size=resamples).astype(np.float64)

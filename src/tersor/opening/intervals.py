"""Intervals of shares whose cases come in groups: battles on one instance share its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

#: Resamples of a bootstrap.
RESAMPLES = 1000
_Z = 1.959964


class Interval(NamedTuple):
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def share(numerators: Sequence[float], denominators: Sequence[float], groups: Sequence[str], *, seed: int = 0,
          resamples: int = RESAMPLES) -> Interval | None:  # fmt: skip
    """Sum of ``numerators`` over sum of ``denominators``, with the percentile bootstrap over whole groups.

    None where the denominators sum to 0. A share of 0 or 1 has no spread to resample: it gets Wilson's interval for as
    many cases as there are groups.

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
    if value in (0.0, 1.0):
        wilson = _Z**2 / (int((below > 0).sum()) + _Z**2)
        return Interval(value, 0.0, wilson) if value == 0 else Interval(value, 1 - wilson, 1.0)
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(value, min(float(low), value), max(float(high), value))


@lru_cache(maxsize=1)  # the figures of a report are over the same groups
def weights(groups: int, *, seed: int, resamples: int) -> npt.NDArray[np.float64]:
    """How often each group is drawn in each resample, ``[resamples, groups]`` float64."""
    even = np.full(groups, 1 / groups)
    return np.random.default_rng(seed).multinomial(groups, even, size=resamples).astype(np.float64)

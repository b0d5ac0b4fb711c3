"""Samples over seeds."""

from __future__ import annotations

import pytest

from tersor.bench.measure import over_seeds
from tersor.grids.samples import Quality, Samples


def test_quality_is_over_all_seeds() -> None:
    ours = Quality([Samples([1, 1, 0, 1], 2.0, 3.0, [30, 32]), Samples([1, 1, 1, 1], 4.0, 6.0, [34, 32])])
    base = Quality([Samples([1, 1, 1, 1], 2.0, 3.0, [49]), Samples([1, 1, 1, 1], 4.0, 6.0, [49])])
    assert ours.accuracy().value == pytest.approx(7 / 8)
    assert ours.against(base).value == pytest.approx(-1 / 8)
    assert ours.passes() == 32
    distance = ours.distance()
    assert distance.value == 3
    # Student's t with one degree of freedom, standard deviation sqrt(2) over sqrt(2).
    assert distance.high == pytest.approx(3 + 12.706)
    assert over_seeds([5.0]).low == 5

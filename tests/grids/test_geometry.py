"""The geometry of grids."""

from __future__ import annotations

from itertools import product

import pytest

from tersor.grids.geometry import front_count, fronts


@pytest.mark.parametrize("sizes", list(product(range(1, 6), repeat=3)) + list(product(range(1, 6), repeat=2)))
def test_fronts_partition_the_grid(sizes: tuple[int, ...]) -> None:
    found = fronts(sizes)
    assert len(found) == front_count(sizes) == sum(sizes) - len(sizes) + 1
    assert sorted(cell for front in found for cell in front) == sorted(product(*map(range, sizes)))
    for distance, front in enumerate(found):
        assert front == sorted(front) and front, "raster order, never empty"
        assert {sum(cell) for cell in front} == {distance}

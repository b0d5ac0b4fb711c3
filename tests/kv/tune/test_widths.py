"""Widths within a budget, against trying them all."""

from __future__ import annotations

import random
from itertools import product

import pytest

from tersor.kv.tune.widths import Cost, choose_widths


@pytest.mark.parametrize("seed", range(8))
def test_no_other_widths_lose_less_within_the_budget(seed: int) -> None:
    draw = random.Random(seed)
    # As measured losses do, these go up here and there with the width.
    parts = [{width: Cost(width * size, draw.random() / width) for width in (2, 3, 4, 8)} for size in (3, 3, 5, 5, 7)]
    budget = draw.randint(46, 184)

    def total(widths: tuple[int, ...]) -> tuple[int, float]:
        costs = [part[width] for part, width in zip(parts, widths, strict=True)]
        return sum(cost.bytes for cost in costs), sum(cost.loss for cost in costs)

    sums = [total(widths) for widths in product((2, 3, 4, 8), repeat=len(parts))]
    taken, loss = total(tuple(choose_widths(parts, budget)))
    assert taken <= budget
    assert loss == pytest.approx(min(other for size, other in sums if size <= budget))


def test_a_part_whose_bytes_count_from_the_widest_is_the_same_part() -> None:
    keys = {2: Cost(20, 1.0), 4: Cost(40, 0.0)}
    values = {2: Cost(-20, 2.0), 4: Cost(0, 0.0)}
    assert choose_widths([keys, values], 20) == [2, 4]


def test_a_budget_below_the_fewest_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="budget=39 is below 40 bytes"):
        choose_widths([{2: Cost(20, 1.0)}, {2: Cost(20, 1.0)}], 39)

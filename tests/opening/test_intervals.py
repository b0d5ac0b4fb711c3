from __future__ import annotations

import numpy as np
import pytest

from tersor.opening.intervals import share


def test_groups_widen_the_interval_by_the_root_of_their_size() -> None:
    hits = np.random.default_rng(0).integers(2, size=400)
    alone = share(hits, np.ones(400), [str(i) for i in range(400)])
    copies = share(np.repeat(hits, 4), np.ones(1600), [str(i) for i in np.repeat(np.arange(400), 4)])
    assert alone is not None and copies is not None
    assert alone == pytest.approx(copies), "four copies of a case are no more than one"


def test_the_interval_is_that_of_a_binomial_share() -> None:
    found = share([1] * 30 + [0] * 70, [1] * 100, [str(i) for i in range(100)], resamples=5000)
    assert found is not None and found.value == 0.3
    assert found.high - found.low == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 100) ** 0.5, rel=0.1)


def test_a_case_that_does_not_count_changes_nothing_and_nothing_at_all_is_none() -> None:
    assert share([0, 0], [0, 0], ["a", "b"]) is None
    assert share([], [], []) is None
    found = share([1, 0, 0], [1, 1, 0], ["a", "b", "a"])
    assert found is not None and found.value == 0.5 and (found.low, found.high) == (0, 1)


def test_a_share_of_none_or_all_has_an_interval_as_wide_as_its_groups_are_few() -> None:
    none, every = share([0] * 20, [1] * 20, [str(i) for i in range(20)]), share([1] * 20, [1] * 20, ["a"] * 20)
    assert none is not None and every is not None
    assert (none.low, none.high) == (0, pytest.approx(0.161, abs=1e-3)), "Wilson's for 0 of 20"
    assert every.high == 1 and every.low < 0.3, "twenty battles on one instance are one case"

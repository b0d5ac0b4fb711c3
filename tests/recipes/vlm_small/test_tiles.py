"""Tile pictures: the answer is what the pixels show, and questions without one answer are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_pixels import halves
from vlm_small.tiles import COLOURS, KINDS, MOST_COUNTED, picture, samples


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS), tiles=st.integers(1, 8))
def test_answers_follow_from_the_pixels(seed: int, kind: str, tiles: int) -> None:
    shown, question = samples(1, kind=kind, seed=seed, grid=5, tiles=tiles)[0]
    seen = {(row, column): halves(shown.pixels, row, column) for row in range(5) for column in range(5)}
    coloured = {cell: pair for cell, pair in seen.items() if pair[0] is not None}
    assert len(coloured) == tiles == len(shown.tiles)
    asked = question.text.split()[1]
    matching = {cell: pair for cell, pair in coloured.items() if pair[0] == asked}
    assert set(question.relevant) == set(matching)
    if kind == "color":
        assert question.answer == next(iter(matching.values()))[1]
        assert len(matching) == 1
    else:
        assert question.answer == str(len(matching))


def test_counts_are_balanced_and_seeds_repeat() -> None:
    drawn = samples(300, kind="count", seed=4, grid=8)
    answers = [question.answer for _, question in drawn]
    assert all(35 <= answers.count(str(n)) <= 90 for n in range(MOST_COUNTED + 1))
    again = samples(300, kind="count", seed=4, grid=8)
    assert all(np.array_equal(a[0].pixels, b[0].pixels) and a[1] == b[1] for a, b in zip(drawn, again, strict=True))
    assert [q.text for _, q in samples(20, kind="color", seed=5)] != [
        q.text for _, q in samples(20, kind="color", seed=6)
    ]


def test_bad_requests_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="tiles=17"):
        picture(rng, grid=4, tiles=17)
    with pytest.raises(ValueError, match="kind 'shape'"):
        samples(1, kind="shape", seed=0)
    shown = picture(rng, grid=4, tiles=4)
    absent = next(name for name in COLOURS if not shown.keyed(name))
    with pytest.raises(ValueError, match="exactly one"):
        shown.ask("color", absent)

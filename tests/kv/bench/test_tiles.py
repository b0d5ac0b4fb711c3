"""Tile pictures: the answer is what the pixels lead to, and every question has one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_pixels import halves

from tersor.kv.bench.tiles import CELL, COLOURS, FILLER, KINDS, STEPS, picture, samples


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS), tiles=st.integers(2, 8), fillers=st.integers(0, 90))
def test_answers_follow_from_the_pixels(seed: int, kind: str, tiles: int, fillers: int) -> None:
    ((shown, question),) = samples(1, kinds=(kind,), seed=seed, grid=5, tiles=tiles, fillers=fillers)
    pixels = shown.pixels
    seen = {(row, column): halves(pixels, row, column) for row in range(5) for column in range(5)}
    coloured = {pair[0]: (cell, pair[1]) for cell, pair in seen.items() if pair[0] is not None}
    assert len(coloured) == tiles, "every tile has another key"
    asked, wanted = question.text.split()[1], []
    for _ in range(STEPS[kind]):
        cell, asked = coloured[asked]
        wanted.append(cell)
    assert (question.answer, question.steps) == (asked, tuple(wanted))
    assert question.text.split()[0] == kind == question.kind
    assert len(question.text.split()) == fillers + 3 and question.text.endswith(" ?")


def test_every_tile_points_to_another() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        shown = picture(rng, grid=6, tiles=5)
        keys = {tile.key for tile in shown.tiles}
        assert all(tile.value in keys - {tile.key} for tile in shown.tiles)
    values = [tile.value for _ in range(50) for tile in picture(rng, grid=4, tiles=2, closed=False).tiles]
    assert set(values) == set(COLOURS), "values of open pictures are any colours"


def test_a_cell_of_noise_is_grey_and_a_picture_repeats() -> None:
    shown, _ = samples(1, kinds=("look",), seed=3, grid=4, tiles=2)[0]
    noise = [
        shown.pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        for row, column in np.ndindex(4, 4)
        if (row, column) not in {tile.cell for tile in shown.tiles}
    ]
    assert all((cell.min() >= 96) and (cell.max() < 160) and (np.ptp(cell, axis=2) == 0).all() for cell in noise)
    assert len({cell.tobytes() for cell in noise}) == 14
    assert np.array_equal(shown.pixels, shown.pixels)


def test_fewer_samples_are_the_first_of_more_and_seeds_differ() -> None:
    many, few = samples(6, seed=4, grid=8), samples(2, seed=4, grid=8)
    assert [many[index] for index in (0, 1, 6, 7, 12, 13)] == few
    assert [question.kind for _, question in few] == [kind for kind in KINDS for _ in range(2)]
    assert few != samples(2, seed=5, grid=8)
    assert samples(2, seed=4, grid=8, kinds=("trail",)) == few[4:]


def test_the_filler_says_nothing() -> None:
    assert not {*COLOURS, *KINDS, "?"} & set(FILLER) and len(FILLER) > 66


def test_bad_requests_are_refused() -> None:
    rng = np.random.default_rng(0)
    for tiles, closed in ((17, True), (9, False), (1, True), (0, False)):
        with pytest.raises(ValueError, match=f"tiles={tiles}"):
            picture(rng, grid=4, tiles=tiles, closed=closed)
    with pytest.raises(ValueError, match="kind 'shape'"):
        samples(1, kinds=("shape",), seed=0)
    shown = picture(rng, grid=4, tiles=4)
    absent = next(name for name in COLOURS if name not in {tile.key for tile in shown.tiles})
    with pytest.raises(ValueError, match=f"whose upper half is {absent}"):
        shown.ask("look", absent)

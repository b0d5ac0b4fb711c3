"""The window of speculative decoding: what is fed, what comes out, and where first drafts come from."""

from __future__ import annotations

import pytest

from tersor.grids.geometry import RasterGrid
from tersor.grids.speculative.schedule import Window


@pytest.mark.parametrize("end_of_row", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 5, 20])
@pytest.mark.parametrize("decided", [1, 2, 5])
def test_every_slot_that_may_be_stale_is_fed_before_it_is_seen(end_of_row, size, decided) -> None:
    grid = RasterGrid(3, 4, end_of_row=end_of_row)
    window, right, counted = Window(grid, size, above=True), -1, 0
    step = window.advance(0)
    assert (step.cells, step.targets, step.fed) == (((0, 0),), (0,), ())
    last = 1
    while (step := window.advance(last)) is not None:
        counted += last
        # Right: up to the token before the last decided one, which was drawn anew and is fed first.
        right = grid.offset(*divmod(counted - 1, 4)) - 1
        assert step.fed == step.sources == tuple(range(right + 1, step.targets[-1]))
        assert len(step.cells) == min(size, 12 - counted)
        assert [grid.offset(*cell) for cell in step.cells] == list(step.targets)
        assert [step.fed[each] + 1 for each in step.keep] == list(step.targets), "a token gives the next one"
        last = min(decided, len(step.cells))
    assert counted + last == 12


def test_first_drafts_come_from_known_cells_above_or_to_the_left() -> None:
    grid = RasterGrid(4, 3)
    above, left = Window(grid, 8, above=True), Window(grid, 8, above=False)
    for window in (above, left):
        window.advance(0)
        window.advance(1)
        assert window.new == range(1, 9)
    # The first row copies its only known cell, and so do the rows below it.
    assert above.origins == left.origins == [0] * 8
    for window in (above, left):
        window.advance(2)
        assert window.new == range(9, 11)
    assert above.origins == [6, 7]
    assert left.origins == [8, 8]
    above.advance(5)
    assert above.new == range(11, 12) and above.origins == [8]
    above.advance(1)
    assert list(above.new) == []

"""Geometry and schedules: closed forms, readiness, and the pass counts that papers print."""

from __future__ import annotations

import doctest
from itertools import product

import pytest

from tersor.grids import geometry
from tersor.grids import schedule as schedule_module
from tersor.grids.geometry import RasterGrid, fronts
from tersor.grids.schedule import (
    Frontier,
    ZipARSchedule,
    raster_passes,
    resolve_row_start,
    resolve_window,
    zipar_passes,
)
from tersor.grids.zipar import generation as zipar

MODES = ("eol", "conservative", "eager")


GRIDS = list(product(range(1, 8), range(1, 8)))


def schedule(rows: int, columns: int, window: int, mode: str) -> ZipARSchedule:
    return ZipARSchedule(RasterGrid(rows, columns, end_of_row=mode == "eol"), window, mode)


def readiness(order: ZipARSchedule, window: int) -> bool:
    """Whether every token was decided after its row's left part and ``window`` cells of the row above."""
    pass_of = order.production()
    for row, column in order.grid.cells():
        left = column == 0 or pass_of[row][column - 1] < pass_of[row][column]
        above = row == 0 or all(
            pass_of[row - 1][k] < pass_of[row][column] for k in range(column, min(column + window, order.grid.columns))
        )
        if not (left and above):
            return False
    return True


@pytest.mark.parametrize("mode", MODES)
def test_passes_follow_the_closed_form_and_decide_every_cell_once(mode: str) -> None:
    for rows, columns in GRIDS:
        counts = []
        for window in range(1, columns + 1):
            order = schedule(rows, columns, window, mode)
            steps = list(order)
            decided = [cell for step in steps for cell in step.yields]
            assert sorted(decided) == list(order.grid.cells())
            assert len(steps) == order.passes == zipar_passes(rows, columns, window, mode)
            counts.append(len(steps))
        assert counts == sorted(counts), "a larger window never needs fewer passes"
        assert counts[-1] == rows * columns, "the full window is raster decoding"


@pytest.mark.parametrize("mode", MODES)
def test_each_cell_comes_out_in_the_pass_of_its_formula(mode: str) -> None:
    for rows, columns in GRIDS:
        for window in range(1, columns + 1):
            table = schedule(rows, columns, window, mode).production()
            for row, column in product(range(rows), range(columns)):
                start = row * window if mode != "conservative" or row == 0 else columns + (row - 1) * window
                assert table[row][column] == 1 + start + column


@pytest.mark.parametrize("mode", MODES)
def test_every_token_waits_for_its_window_and_not_longer(mode: str) -> None:
    for rows, columns in GRIDS:
        for window in range(1, columns + 1):
            order = schedule(rows, columns, window, mode)
            assert readiness(order, window)
            # Row 1 waits for all of row 0 in conservative mode, so only row 2 can show that the window is tight.
            if window < columns and rows > 1 + (mode == "conservative"):
                assert not readiness(order, window + 1)


def test_the_readiness_check_notices_a_row_that_starts_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    early = RasterGrid.ready
    monkeypatch.setattr(RasterGrid, "ready", lambda self, row, c, window, n: early(self, row, c, window - 1, n))
    assert not readiness(schedule(4, 5, 3, "eol"), 3)


@pytest.mark.parametrize("mode", MODES)
def test_feeds_are_in_order_and_each_yields_the_cell_after_it(mode: str) -> None:
    for rows, columns, window in ((5, 6, 2), (3, 4, 4), (6, 3, 1), (1, 5, 2), (5, 1, 1)):
        order = schedule(rows, columns, window, mode)
        grid, fed, started = order.grid, set(), 0
        for step in order:
            offsets = [feed.offset for feed in step.feeds]
            assert offsets == sorted(set(offsets))
            assert set(step.replaced) == fed & set(offsets)
            fed.update(offsets)
            for feed in step.feeds:
                if feed.yields is not None:
                    assert grid.feeder(*feed.yields) == feed.offset
                if feed.source is None:
                    assert feed.offset % grid.stride == columns
                elif grid.offset(*feed.source) != feed.offset:
                    # A proxy stands for the last token of a row that is still open.
                    assert feed.yields is not None and feed.yields[1] == 0
            starts = sum(column == 0 for _, column in step.yields)
            assert starts <= 1, "one new row a pass at most"
            started += starts
        assert started == rows
        last_cell = grid.offset(rows - 1, columns - 1)
        expected = {grid.offset(r, c) for r, c in grid.cells()} - {last_cell}
        expected |= {grid.offset(r, columns) for r in range(rows - 1)} if grid.end_of_row else set()
        assert fed == expected, "keys and values of every token but the last, and nothing else"


def test_a_proxy_is_the_decided_token_straight_above_or_nearest_to_it() -> None:
    steps = list(schedule(4, 6, 2, "conservative"))
    proxies = [
        (feed.yields, feed.source)
        for step in steps
        for feed in step.feeds
        if feed.yields and feed.yields[1] == 0 and feed.source != (feed.yields[0] - 1, 5)
    ]
    # Row 1 waits for row 0. Row 2 starts when row 1 has two tokens, row 0 is complete: straight above the hole.
    # Row 3 starts two passes later, when row 1 has four.
    assert proxies == [((2, 0), (0, 5)), ((3, 0), (1, 3))]
    first = next(step for step in schedule(3, 6, 2, "eager") if (1, 0) in step.yields)
    assert [feed.source for feed in first.feeds] == [(0, 1), (0, 1)], "eager: the last decided token of row 0"


PUBLISHED = [
    # rows, columns, row start, the paper's window, its passes
    (24, 24, "conservative", 16, 422),
    (24, 24, "conservative", 14, 378),
    (24, 24, "conservative", 12, 338),
    (32, 32, "conservative", 15, 562),
    (32, 32, "conservative", 11, 451),
    (32, 32, "conservative", 7, 324),
    (32, 32, "conservative", 3, 185),
    # Lumina-mGPT's windows count the end-of-row token: one less in cells.
    (48, 48, "eol", 19, 1063),
    (48, 48, "eol", 10, 588),
]


@pytest.mark.parametrize(("rows", "columns", "mode", "least", "published"), PUBLISHED)
def test_published_passes_are_those_of_an_adaptive_window(rows, columns, mode, least, published) -> None:
    # Every row start is verified once at least, and each rejection adds a pass.
    without_rejections = zipar_passes(rows, columns, least + 1, mode)
    assert without_rejections <= published <= 1.09 * without_rejections
    # A fixed window of that size would take fewer.
    assert zipar_passes(rows, columns, least, mode) < published


def test_published_passes_without_rejections_are_met_exactly() -> None:
    assert zipar_passes(24, 24, 17, "conservative") == 422
    assert zipar_passes(24, 24, 15, "conservative") == 378


def test_emu3_at_90_by_90() -> None:
    order = schedule(90, 90, 7, "eol")
    assert order.passes == len(list(order)) == 713
    assert raster_passes(order.grid) == 8190
    assert round(1 - 713 / 8190, 3) == 0.913
    assert raster_passes(RasterGrid(48, 48, end_of_row=True)) == 2352
    assert raster_passes(RasterGrid(24, 24)) == 576
    widest = max(len(step.feeds) for step in order)
    assert widest <= -(-90 // 7) + 1


def test_adaptive_rows_start_when_their_trial_is_accepted_or_the_row_above_is_complete() -> None:
    for accepts_at, expected in ((0, 3), (1, 4), (None, 6)):
        frontier = Frontier(RasterGrid(2, 6, end_of_row=True), 2, "eol", adaptive=True)
        number, trials, start, accepted = 0, 0, None, False
        while (step := frontier.advance(accepted=accepted)) is not None:
            number += 1
            accepted = False
            if step.trial is not None:
                trials += 1
                # The first pass of a trial draws the candidate, later ones verify it.
                accepted = trials > 1 and accepts_at is not None and trials - 2 >= accepts_at
            if (1, 0) in step.yields and (step.trial != (1, 0) or accepted):
                start = number
        assert start == 1 + expected
        assert number == expected + 6


def test_trials_feed_their_row_start_anew() -> None:
    frontier = Frontier(RasterGrid(3, 6), 2, "conservative", adaptive=True)
    steps = []
    while (step := frontier.advance(accepted=False)) is not None:
        steps.append(step)
    offset = RasterGrid(3, 6).feeder(2, 0)
    fed = [step for step in steps if offset in [feed.offset for feed in step.feeds]]
    assert [step.trial for step in fed] == [(2, 0)] * 4 + [None]
    assert [offset in step.replaced for step in fed] == [False, True, True, True, True]


def test_windows_and_row_starts_resolve() -> None:
    assert [resolve_window(name, 24) for name in ("quality", "balanced", "fast")] == [16, 12, 6]
    assert [resolve_window(name, 7) for name in ("quality", "balanced", "fast")] == [5, 4, 2]
    assert resolve_window(30, 24) == 24
    assert resolve_row_start("auto", RasterGrid(2, 2, end_of_row=True)) == "eol"
    assert resolve_row_start("auto", RasterGrid(2, 2)) == "conservative"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RasterGrid(0, 3), "at least 1 token"),
        (lambda: RasterGrid(2.0, 3), "at least 1 token"),
        (lambda: fronts(()), "at least 1 token"),
        (lambda: resolve_window(0, 4), "from 1 to"),
        (lambda: resolve_window(True, 4), "from 1 to"),
        (lambda: resolve_window("huge", 4), "balanced"),
        (lambda: schedule(4, 4, 5, "eol"), "from 1 to 4"),
        (lambda: schedule(4, 4, 0, "eol"), "from 1 to 4"),
        (lambda: Frontier(RasterGrid(4, 4), 2, "eol"), "has no end-of-row"),
        (lambda: Frontier(RasterGrid(4, 4, end_of_row=True), 2, "eager"), "must be one of \\('eol',\\)"),
    ],
)
def test_bad_geometry_is_refused_with_what_is_allowed(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_examples_in_docstrings() -> None:
    for module in (geometry, schedule_module, zipar):
        assert doctest.testmod(module).failed == 0

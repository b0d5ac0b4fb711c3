"""Settings of speculative decoding."""

from __future__ import annotations

import pytest

from tersor.grids.geometry import RasterGrid
from tersor.grids.speculative.config import SpeculativeConfig


@pytest.mark.parametrize(
    ("columns", "device", "rows", "cells"),
    [(14, "cpu", 1, 28), (24, "cpu", 1, 32), (14, "cpu", 16, 16), (14, "cpu", 1000, 1), (24, "cuda", 64, 48),
     (90, "cuda", 1, 128)],
)  # fmt: skip
def test_the_automatic_window_is_two_rows_or_what_the_device_has_left(columns, device, rows, cells) -> None:
    grid = RasterGrid(columns, columns)
    assert SpeculativeConfig().window(grid, device, rows) == cells
    assert SpeculativeConfig(window_size=7).window(grid, device, rows) == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"window_size": True}, "whole number"), ({"window_size": 0}, "at least 1"), ({"window_size": "all"}, "'auto'"),
     ({"mode": "same"}, "'seed', 'law', 'grouped'"), ({"first_drafts": "right"}, "'above', 'left'")],
)  # fmt: skip
def test_settings_outside_their_range_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        SpeculativeConfig(**settings)


def test_only_the_seed_mode_takes_a_generator_an_image() -> None:
    assert [SpeculativeConfig(mode=mode).one_generator for mode in ("seed", "law", "grouped")] == [False, True, True]

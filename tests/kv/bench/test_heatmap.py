"""The heat map: what was left out is dark, and every half of a cell has its mean colour."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tersor.kv.bench.heatmap import heatmap, kept_cells
from tersor.kv.bench.tiles import picture


def test_a_heat_map_darkens_what_was_left_out() -> None:
    shown = picture(np.random.default_rng(1), grid=4, tiles=2)
    kept = kept_cells([0, 2, 7, 17, 18], first=2, rows=4, width=4)  # columns outside the picture are text
    assert np.argwhere(kept).tolist() == [[0, 0], [1, 1], [3, 3]]
    svg = heatmap(shown.pixels, [kept], ["layer 0"], description="kept cells", relevant=[(1, 1)])
    assert svg.count("h8v8h-8z") == 13
    assert 'stroke="#fff"' in svg
    assert 'aria-label="kept cells"' in svg
    with pytest.raises(ValueError, match="one label"):
        heatmap(shown.pixels, [kept], [], description="d")
    with pytest.raises(ValueError, match="does not divide"):
        heatmap(shown.pixels[:30], [kept], ["a"], description="d")


def test_a_cell_is_drawn_in_the_mean_colours_of_its_halves() -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)  # one row of two cells, two pixels wide and four high
    pixels[:2, :2] = [(255, 0, 0), (0, 0, 0)]
    pixels[2:, 2:] = (16, 32, 48)
    svg = heatmap(pixels, [np.ones((1, 2), dtype=bool)], ["all"], description="colours")
    tiles = re.findall(r'<rect x="(\d+)" y="([\d.]+)" width="8" height="4" fill="(#\w+)"/>', svg)
    assert tiles == [("0", "0", "#7f0000"), ("8", "0", "#000000"), ("0", "4", "#000000"), ("8", "4", "#102030")]


def test_labels_and_description_are_escaped_and_the_picture_comes_first() -> None:
    kept = np.array([[True, False]])
    svg = heatmap(np.zeros((2, 2, 3), np.uint8), [kept, ~kept], ["a < b", "c"], description='"x" & y')
    assert re.findall(r">([^<>]+)</text>", svg) == ["the picture", "a &lt; b", "c"]
    assert 'aria-label="&quot;x&quot; &amp; y"' in svg
    assert re.findall(r'<path d="(.*?)"', svg) == ["M8 0h8v8h-8z", "M0 0h8v8h-8z"]

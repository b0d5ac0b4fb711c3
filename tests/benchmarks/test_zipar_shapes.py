"""Passes of Emu3-8B's shape run on a CPU with small sizes: same code, no statement about speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import zipar_shapes

from tersor.bench.records import read_jsonl


def test_zipar_shapes_extrapolates_what_it_measures(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    small = ["--grid", "6x8", "--window", "2", "--layers", "1", "--hidden", "512", "--vocabulary", "50"]
    records = zipar_shapes.main([*small, "--samples", "3", "--repeats", "2", "--dtype", "float32", "--out", str(out)])
    assert read_jsonl(out) == records
    ratio, raster, zipar = records[:3]
    assert all("extrapolated" in record.item for record in (ratio, raster, zipar))
    assert ratio.peer == pytest.approx(6 * 9 / (8 + 5 * 2))
    parts = {name: [each for each in records[3:] if each.item.startswith(name)] for name in ("raster", "zipar")}
    assert [len(each) for each in parts.values()] == [6, 6]
    assert "random weights: 1 of 32 layers" in ratio.shapes
    # Medians of two rounds are means, so the whole follows from the parts: 32 layers and one head, by 54 passes.
    layers = sum(each.measured for each in parts["raster"] if each.quantity.endswith("layers"))
    heads = sum(each.measured for each in parts["raster"] if each.quantity.endswith("head"))
    assert raster.measured == pytest.approx((32 * layers + heads) / 3 * 54 / 1e3)


def test_speculative_windows_are_timed_and_their_gain_follows_from_the_cells_of_a_pass() -> None:
    small = ["--grid", "6x8", "--layers", "1", "--hidden", "512", "--vocabulary", "50", "--dtype", "float32"]
    records = zipar_shapes.main([*small, "--speculative", "4", "16", "--samples", "2", "--repeats", "1"])
    gains = [each for each in records if each.quantity == "speed-up over raster"]
    assert len(gains) == 2 * len(zipar_shapes.CELLS_PER_PASS)
    raster = next(each for each in records if each.quantity == "time of an image")
    assert "of 54 passes" in raster.item
    assert [each.peer for each in gains[:3]] == pytest.approx([54 / 48 * cells for cells in (2.1, 4, 4)])
    costs = {each.item: each.measured for each in records if each.quantity == "time of a pass"}
    assert set(costs) == {"speculative 4 against raster", "speculative 16 against raster"}
    # Two cells a pass: twice as fast, and an end-of-row token less for each row, over what a pass costs.
    assert gains[0].measured == pytest.approx(54 / 48 * 2.1 / costs["speculative 4 against raster"])
    points = zipar_shapes.speculative_points(zipar_shapes.RasterGrid(90, 90, end_of_row=True), 64, 3)
    for each in points:
        assert each.held == tuple(range(each.fed[0])) and len(each.keep) == 64 <= len(each.fed) <= 66


def test_the_passes_that_are_measured_are_those_of_the_schedule() -> None:
    grid = zipar_shapes.RasterGrid(90, 90, end_of_row=True)
    raster, zipar = zipar_shapes.raster_points(grid, 4), zipar_shapes.zipar_points(grid, 7, 4)
    assert [len(each.held) for each in raster] == [1022, 3070, 5117, 7165]
    assert all(len(each.fed) == len(each.keep) == 1 for each in raster)
    assert [len(each.fed) >= 12 for each in zipar] == [True] * 4
    for each in zipar:
        assert not set(each.held) & set(each.fed)
        assert list(each.fed) == sorted(each.fed)
    # The schedule's own account: all cells and the end-of-row tokens between rows are fed, the last cell is not.
    assert len(zipar[-1].held) < 90 * 91 - 1

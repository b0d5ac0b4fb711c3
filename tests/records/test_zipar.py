"""ZipAR's claims on the committed records: what docs/zipar.md shows must keep saying what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersor.bench.records import Record, read_jsonl

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
SHARE = "share of the pass ratio"


@pytest.fixture(scope="module")
def speed() -> dict[str, Record]:
    return {record.item: record for record in read_jsonl(RESULTS / "images_speed.jsonl") if record.quantity == SHARE}


def test_fewer_passes_are_less_time_at_every_window(speed: dict[str, Record]) -> None:
    windows = {int(item.split()[1].rstrip(":")): each for item, each in speed.items() if item.startswith("window")}
    assert min(windows) == 1 and max(windows) == 14
    assert {window: each.measured for window, each in windows.items() if (each.measured or 0) < 0.8} == {}


@pytest.mark.parametrize("name", ["zipar_shapes", "zipar_gpu"])
def test_emu3s_shape_is_five_times_as_fast(name: str) -> None:
    (speed_up,) = (r for r in read_jsonl(RESULTS / f"{name}.jsonl") if r.quantity == "speed-up over raster")
    assert speed_up.low is not None and speed_up.low >= 5
    assert "extrapolated" in speed_up.item

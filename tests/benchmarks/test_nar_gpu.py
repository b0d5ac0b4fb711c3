"""The GPU script runs on a CPU with small shapes: same code, no statement about speed."""

from __future__ import annotations

import json
from pathlib import Path

import nar_gpu
import nar_samples
import pytest
import torch

from tersor.bench.records import read_jsonl

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--device", "cpu", "--dtype", "float32", "--layers", "1", "--hidden", "32", "--grid", "4x4", "--repeats", "1"]


def test_every_way_is_measured(tmp_path) -> None:
    out = tmp_path / "records.jsonl"
    records = nar_gpu.main([*SMALL, "--batches", "1", "2", "--out", str(out)])
    assert read_jsonl(out) == records and len(records) == 2 * 5
    assert all(record.claim is None and "random weights" in record.shapes for record in records)
    assert [record.item for record in records[:3]] == [
        "NAR, 7 passes, batch 1", "PAR-4X, 7 passes, batch 1", "raster, 16 passes, batch 1"
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", [["--grid", "16"], ["--grid", "3x4"], ["--hidden", "30"], ["--batches", "0"]])
def test_bad_arguments(arguments) -> None:
    with pytest.raises(SystemExit):
        nar_gpu.main(arguments)


def test_the_pictures_of_the_docs_are_drawn(tmp_path) -> None:
    assert nar_samples.main(["--out", str(tmp_path / "drawn.json")]) == 0
    drawn, kept = (
        json.loads(file.read_text(encoding="utf-8"))
        for file in (tmp_path / "drawn.json", ROOT / "benchmarks" / "results" / "nar_samples.json")
    )
    # Ids depend on the last bit of a machine's arithmetic; what is drawn does not.
    for part in ("images", "clips", "captions"):
        assert [{**each, "ids": None, "sheet": None} for each in drawn[part]] == [
            {**each, "ids": None, "sheet": None} for each in kept[part]
        ]
    assert torch.tensor(drawn["clips"][0]["ids"]).shape == (3, 4, 7, 7)
    assert torch.tensor(drawn["images"][0]["sheet"]).shape == (10, 14, 14)

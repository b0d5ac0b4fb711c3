"""A long calibration is timed in parts."""

from __future__ import annotations

from dataclasses import replace

import ptq_calibration
import pytest
from PIL import Image

from tersor.bench.records import read_jsonl
from tersor.ptq.networks import RepNetConfig


@pytest.mark.slow
def test_a_long_calibration_is_timed_in_parts(monkeypatch, tmp_path, capsys) -> None:
    small = RepNetConfig(stem=8, widths=(8, 8), depths=(1, 2), strides=(2, 2), stem_stride=4, classes=("a", "b"))
    monkeypatch.setitem(ptq_calibration.SHAPES, ptq_calibration.NAME, small)
    monkeypatch.setattr(ptq_calibration, "IMAGES", 8)
    monkeypatch.setattr(ptq_calibration, "CONFIG", replace(ptq_calibration.CONFIG, iterations=2))
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.effect_noise((300, 260), 90).convert("RGB").save(photos / "noise.png")
    out = tmp_path / "r.jsonl"
    command = ["--data", str(photos), "--work", str(tmp_path / "work"), "--out", str(out)]
    assert ptq_calibration.main([*command, "--stages", "2"]) == 0
    assert not out.exists() and len(list((tmp_path / "work" / "stages").glob("*.safetensors"))) == 2
    assert ptq_calibration.main(command) == 0
    told = {record.quantity: record.measured for record in read_jsonl(out)}
    assert told["parts that it was interrupted into"] == 2
    assert told["end repeated from a stage border, the same bit for bit (1 yes)"] == 1

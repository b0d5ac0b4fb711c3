"""A long calibration is timed in parts."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tersor.bench.records import read_jsonl
from tersor.ptq.networks import RepNetConfig


@pytest.mark.slow
def test_a_long_calibration_is_timed_in_parts(monkeypatch, tmp_path, capsys) -> None:
    file = Path(__file__).resolve().parents[3] / "benchmarks" / "ptq_calibration.py"
    spec = importlib.util.spec_from_file_location("ptq_calibration", file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    small = RepNetConfig(stem=8, widths=(8, 8), depths=(1, 2), strides=(2, 2), stem_stride=4, classes=("a", "b"))
    monkeypatch.setitem(script.SHAPES, script.NAME, small)
    monkeypatch.setattr(script, "IMAGES", 8)
    monkeypatch.setattr(script, "CONFIG", replace(script.CONFIG, iterations=2))
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.effect_noise((300, 260), 90).convert("RGB").save(photos / "noise.png")
    out = tmp_path / "r.jsonl"
    command = ["--data", str(photos), "--work", str(tmp_path / "work"), "--out", str(out)]
    assert script.main([*command, "--stages", "2"]) == 0
    assert not out.exists() and len(list((tmp_path / "work" / "stages").glob("*.safetensors"))) == 2
    assert script.main(command) == 0
    told = {record.quantity: record.measured for record in read_jsonl(out)}
    assert told["parts that it was interrupted into"] == 2
    assert told["end repeated from a stage border, the same bit for bit (1 yes)"] == 1

"""`tersor bench vlm` and `tersor bench photos`: records, tables and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tersor.bench.records import read_jsonl
from tersor.cli import run


def test_the_command_writes_records_and_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "vlm.jsonl"
    assert run(["bench", "vlm", "--samples", "1", "--tau", "0.9", "--out", str(out)]) == 0
    assert "ZipVL evict 0.9" in capsys.readouterr().out
    records = read_jsonl(out)
    dense = {r.item: r.measured for r in records if r.item.startswith("dense: ")}
    assert dense["dense: prompt"] == 1.0 or dense["dense: cache"] == 1.0
    assert {r.quantity for r in records} >= {"accuracy", "tokens in attention", "compression of a 16-bit cache"}
    for bad in (["--samples", "0"], ["--tau", "1.5"], ["--model", "no-such-model"]):
        assert run(["bench", "vlm", *bad]) == 2


def test_photographs_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (160, 160, 3), dtype=np.uint8)).save(tmp_path / "one.png")
    command = ["bench", "photos", "--images", str(tmp_path), "--repeats", "2"]
    assert run([*command, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["quantity"] for r in records] == [
        "tokens in attention", "attention operations saved", "speed-up of the prefill",
    ]  # fmt: skip
    assert records[0]["item"] == "one.png, 405 tokens"
    assert 0 < records[0]["measured"] < 1
    (tmp_path / "two.png").write_text("no picture")
    assert run(command) == 2
    assert run(["bench", "photos", "--images", str(tmp_path / "none")]) == 2
    (tmp_path / "empty").mkdir()
    assert run(["bench", "photos", "--images", str(tmp_path / "empty")]) == 2

"""`tersor bench images`, on the trained model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersor.bench.records import Record, read_jsonl
from tersor.cli import run

BENCH = ["bench", "images", "--windows", "7", "--adaptive", "4", "--eager", "", "--samples", "4", "--seeds", "2"]


def test_the_command_writes_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "images.jsonl"
    assert run([*BENCH, "--repeats", "1", "--batches", "1,2", "--out", str(out), "--json"]) == 0
    records = read_jsonl(out)
    assert [Record.from_json(line) for line in capsys.readouterr().out.splitlines()] == records
    known = {(record.item, record.quantity): record for record in records}
    assert known["window 7: samples", "forward passes"].measured == 112
    assert known["raster: samples", "class accuracy"].n == 8
    assert known["window 7: batch 1", "speed-up over raster"].baseline == 1
    assert known["speculative 28: batch 2", "images equal to raster's"].measured == 1
    assert (
        known["speculative 28: samples", "nats an image"].measured == known["raster: samples", "nats an image"].measured
    )
    assert known["raster: samples", "tokens fed"].measured == 195
    assert known["real images: floor", "Fréchet distance"].n == 3000
    assert [path.name for path in tmp_path.iterdir()] == ["images.jsonl"]


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*BENCH, "--repeats", "0"]) == 0
    text = capsys.readouterr().out
    assert "window 7" in text and "adaptive 4" in text and "112.0" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--windows", "7,x"], "whole numbers with commas"),
        (["--windows", "15"], "from 1 to the grid's 14"),
        (["--samples", "1"], "at least 2"),
        (["--batches", "0"], "whole numbers with commas"),
        (["--temperature", "0"], "must be above 0"),
        (["--dtype", "int8"], "float32, bfloat16 or float16"),
        (["--modes", "exact"], "must be one of"),
        (["--seeds", "0"], "at least 1"),
        (["--model", "tiny-lm"], "makes no images"),
    ],
)
def test_bad_input(arguments, message, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "images", *arguments]) == 2
    assert message in capsys.readouterr().err

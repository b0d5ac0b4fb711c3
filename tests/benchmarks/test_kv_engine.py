"""The engine's own cost: every part runs on small shapes and says what it was measured on."""

from __future__ import annotations

import sys
from pathlib import Path

import kv_engine
import pytest

from tersor.bench.records import read_jsonl


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_every_part_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"uniform 4 bits": kv_engine.PEAKS["uniform 4 bits"]}  # each starts a process
    monkeypatch.setattr(kv_engine, "PEAKS", first)
    out = tmp_path / "records.jsonl"
    small = ["--layers", "4", "--prompt", "64", "--steps", "2", "--peak-tokens", "300", "--repeats", "2"]
    assert kv_engine.main([*small, "--out", str(out)], shapes=((4, 2, 16, 200),)) == 0
    records = read_jsonl(out)
    assert [record.quantity for record in records[:4]] == [
        *["CPU time a layer"] * 2,
        "CPU time over DynamicCache",
        "time over the prompt's attention",
    ]
    assert len(records) == 4 + 2 * len(kv_engine.PEAKS)
    assert all(record.measured is not None and record.measured >= 0 for record in records)
    assert records[3].item == "prompt of 200 tokens, 4 heads and 2 KV heads of 16: probes"

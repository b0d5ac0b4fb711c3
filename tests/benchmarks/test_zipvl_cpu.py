"""Prefill attention on a CPU: dense and sparse in turns, at the ratio that was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import zipvl_cpu

from tersor.bench.records import read_jsonl


def test_the_cpu_benchmark_times_both_and_realises_the_ratio(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    arguments = ["--lengths", "256", "--repeats", "3", "--threads", "1", "--out", str(out)]
    records = zipvl_cpu.main(arguments)
    assert read_jsonl(out) == records
    assert sum(record.quantity == "time" for record in records) == 4
    ratio = next(record.measured for record in records if record.quantity == "kept tokens")
    assert ratio == pytest.approx(0.4, abs=0.05)
    speedup = next(record for record in records if record.quantity.startswith("speed-up over dense"))
    assert speedup.measured > 0
    assert speedup.claim is None  # which is about long prompts

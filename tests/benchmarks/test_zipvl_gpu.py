"""The GPU script of sparse prefills runs on a CPU with small shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import zipvl_gpu

from tersor.bench.records import read_jsonl


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "records.jsonl"
    small = ["--device", "cpu", "--layers", "1", "--hidden", "64", "--steps", "2", "--repeats", "2"]
    records = zipvl_gpu.main([*small, "--lengths", "300", "--shares", "0.421", "--out", str(out)])
    assert read_jsonl(out) == records
    sizes = {record.item: record.measured for record in records if record.quantity == "cache memory"}
    dense, sparse = sizes[f"{zipvl_gpu.DENSE}: 300 tokens"], sizes[f"{zipvl_gpu.name_of(0.421)}: 300 tokens"]
    assert sparse == pytest.approx(0.43 * dense, rel=0.1)
    assert all(record.claim is None for record in records)
    assert "42.1%" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        zipvl_gpu.main([*small, "--shares", "1.5"])

"""ZipVL's demo shows what each layer keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_demos import shrink

from tersor.bench.records import read_jsonl
from tersor.cli import run


def test_zipvl_shows_what_each_layer_keeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shrink(monkeypatch)
    assert run(["demo", "--only", "zipvl", "--out", str(tmp_path), "--json"]) == 0
    records = read_jsonl(tmp_path / "records.jsonl")
    assert records[0].claim == -0.2
    assert records[0].peer_name == "random tokens, as many a layer"
    kept = next(record for record in records if record.quantity == "tokens in attention")
    assert 0 < kept.measured < 1
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("layer 0:") == 2

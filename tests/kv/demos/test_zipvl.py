"""ZipVL's demo shows what each layer keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_demos import run_demo


def test_zipvl_shows_what_each_layer_keeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records, page = run_demo("zipvl", monkeypatch, tmp_path)
    assert records[0].claim == -0.2
    assert records[0].peer_name == "random tokens, as many a layer"
    kept = next(record for record in records if record.quantity == "tokens in attention")
    assert 0 < kept.measured < 1
    assert page.count("layer 0:") == 2

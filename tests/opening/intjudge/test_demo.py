"""The demo's verdict, and one run of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_demos import run_demo

from tersor.opening.intjudge.demo import judge


def test_the_demo_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records, page = run_demo("intjudge", monkeypatch, tmp_path)
    first = records[0]
    assert first.model == "tiny-judge" and first.peer_name == "the same judge, grey pictures"
    assert "no IntJudge-7B" in page


def test_the_verdict_wants_agreement_that_comes_from_the_pictures() -> None:
    assert judge(0.9, 0.6, 0.5) == "holds"
    assert judge(0.9, 0.85, 0.5) == "partly"
    assert judge(0.7, 0.5, 0.5) == "partly"
    assert judge(0.5, 0.5, 0.5) == judge(0.6, 0.4, 0.65) == "fails"

"""`tersor demo` with few samples: every system gives records, and the page has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_demos import shrink

from tersor.bench.records import Record, read_jsonl
from tersor.cli import DEMOS, run


def test_demo_writes_table_page_and_records(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shrink(monkeypatch)
    out = tmp_path / "report"
    assert run(["demo", "--only", "zipcache", "--out", str(out)]) == 0
    assert "zipcache" in capsys.readouterr().out
    records = read_jsonl(out / "records.jsonl")
    assert {record.system for record in records} == {"zipcache"}
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")


def test_every_system_gives_records_with_a_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shrink(monkeypatch)
    assert run(["demo", "--json", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    records = [Record.from_json(line) for line in lines]
    assert records == read_jsonl(tmp_path / "records.jsonl")
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert list(dict.fromkeys(record.system for record in records)) == list(DEMOS)
    for system in DEMOS:
        own = [record for record in records if record.system == system]
        assert any(record.verdict for record in own)
        assert {record.command for record in own} == {f"tersor demo --only {system}"}


def test_an_unknown_system_and_a_file_in_the_way_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["demo", "--only", "zipcash"]) == 2
    assert "--only 'zipcash' is no system of the demo; choose one of" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run(["demo", "--only", "zipcache", "--out", str(tmp_path / "file")]) == 2
    assert "is a file; give a folder for the report" in capsys.readouterr().err

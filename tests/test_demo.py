"""`tersor demo`: what its systems give goes to the table, the page and the records, in the order of the list."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_demos import FEW

from tersor import cli
from tersor.bench.records import Record, read_jsonl
from tersor.bench.report import Section
from tersor.bench.runs import DemoResult, OnProgress, demo_records
from tersor.cli import DEMOS, get_demo, run


def demo_of(system: str) -> Callable[[OnProgress], DemoResult]:
    def demo(on_progress: OnProgress) -> DemoResult:
        on_progress("one number")
        record = demo_records(system, "a model")("an item", "a quantity", "x", 2.0, 1, verdict="holds")
        return DemoResult([record], Section(title=f"What {system} does", intro="In a sentence."))

    return demo


def test_the_systems_run_in_the_order_of_the_list(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "get_demo", demo_of)
    assert run(["demo", "--json", "--out", str(tmp_path / "report")]) == 0
    records = [Record.from_json(line) for line in capsys.readouterr().out.splitlines()]
    assert [record.system for record in records] == list(DEMOS)
    assert records == read_jsonl(tmp_path / "report" / "records.jsonl")
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    places = [page.index(f"What {system} does") for system in DEMOS]
    assert places == sorted(places)


def test_some_systems_alone_and_a_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "get_demo", demo_of)
    assert run(["demo", "--only", "nar", "--only", "zipcache", "--out", str(tmp_path)]) == 0
    assert [each.system for each in read_jsonl(tmp_path / "records.jsonl")] == ["nar", "zipcache"]
    out = capsys.readouterr().out
    assert "a quantity" in out and "holds" in out and f"report: {tmp_path / 'index.html'}" in out.replace("\n", "")


def test_every_demo_has_a_small_one_that_its_room_runs() -> None:
    assert {demo.run for demo in FEW} == {get_demo(system) for system in DEMOS}


def test_an_unknown_system_and_a_file_in_the_way_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["demo", "--only", "zipcash"]) == 2
    assert "--only 'zipcash' is no system of the demo; choose one of" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run(["demo", "--only", "zipcache", "--out", str(tmp_path / "file")]) == 2
    assert "is a file; give a folder for the report" in capsys.readouterr().err

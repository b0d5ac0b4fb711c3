"""`tersor demo`: what its systems give goes to the table, the page and the records, in the order of the list."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_demos import FEW

from tersor import cli
from tersor.bench import runs
from tersor.bench.records import Record, read_jsonl
from tersor.bench.report import Section
from tersor.bench.runs import DemoResult, OnProgress, demo_records
from tersor.cli import DEMOS, get_demo, run

#: `tersor demo` with few samples, where only the base installation is there.
BASE = """
import sys
from base_install import hide
hide()
import pytest, small_demos
small_demos.shrink(pytest.MonkeyPatch())
from tersor.cli import run
sys.exit(run(sys.argv[1:]))
"""


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
    assert "is a file, not a folder; give another path" in capsys.readouterr().err


def test_a_base_installation_runs_what_it_can_and_says_before_what_it_leaves_out(tmp_path: Path) -> None:
    paths = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", BASE, "demo", "--out", str(tmp_path / "report")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("left out: ")]
    said = {system: [line for line in lines if line.startswith(f"left out: {system};")] for system in DEMOS}
    records = read_jsonl(tmp_path / "report" / "records.jsonl")
    ran = [system for system in DEMOS if any(each.system == system for each in records)]
    assert [system for system in DEMOS if not said[system]] == ran and {"zipcache", "minicache", "meswitch"} <= {*ran}
    parts = [line for line in lines if not any(line in each for each in said.values())]
    assert any("plots of zipcache, minicache, meswitch; matplotlib is missing" in line for line in parts)
    assert any("quanto's cache of zipcache; optimum.quanto is missing" in line for line in parts)
    assert all("pip install " in line for line in lines) and lines == done.stderr.splitlines()[: len(lines)]
    assert (tmp_path / "report" / "index.html").read_text(encoding="utf-8").count("<section") >= len(ran)


@pytest.mark.parametrize("system", [system for system, demo in DEMOS.items() if demo.needs])
def test_a_demo_that_lacks_a_package_is_refused_before_any_work(
    system: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = next(iter(DEMOS[system].needs))
    monkeypatch.setattr(runs, "installed", lambda name: name != package)
    monkeypatch.setattr(cli, "import_module", lambda name: pytest.fail("work has begun"))
    assert run(["demo", "--only", system, "--out", str(tmp_path / "report")]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{package} is missing" in line and "pip install " in line
    assert not (tmp_path / "report").exists()

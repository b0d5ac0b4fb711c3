from __future__ import annotations

from pathlib import Path

import pytest

from tersor.bench.records import read_jsonl
from tersor.bench.runs import record_maker
from tersor.cli import run
from tersor.opening.bench.cli import comparison_records
from tersor.opening.compare import Comparison
from tersor.opening.ranking import Tally


def comparison(score: float, low: float, high: float) -> Comparison:
    return Comparison("old", "new", 0.05, score, low, high, 0.3, Tally(400, 100, 100, 200), 400)


def test_records_hold_score_power_and_the_verdict_that_follows() -> None:
    make = record_maker("opening", model="m", seed=0, command="c")
    found = [comparison(0.5, 0.47, 0.53), comparison(0.4, 0.37, 0.43), comparison(0.46, 0.44, 0.48)]
    records = comparison_records(make, found, "scripted:x")
    assert [each.verdict for each in records if each.quantity == "score"] == ["holds", "fails", "partly"]
    assert {each.peer for each in records if each.quantity == "score"} == {0.45}
    assert all("scripted:x" in (each.peer_name or "") for each in records if each.quantity == "score")
    power = next(each for each in records if each.quantity == "passes if equally good")
    assert power.measured == pytest.approx(0.954, abs=0.01)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--windows", "0"], "--windows"), (["--windows", "15"], "from 1 to 14"), (["--windows", "2,2"], "different"),
        (["--margins", "0.6"], "--margins"), (["--margins", "x"], "--margins"), (["--samples", "9"], "--samples"),
    ],
)  # fmt: skip
def test_senseless_options_are_refused_before_anything_runs(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "opening", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_command_writes_its_records_and_keeps_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--windows", "1", "--margins", "0.05", "--samples", "10"]
    out, folder = tmp_path / "records.jsonl", tmp_path / "run"
    assert run(["bench", "opening", *words, "--out", str(out), "--run", str(folder)]) == 0
    assert "scripted:digits" in capsys.readouterr().out
    assert {each.quantity for each in read_jsonl(out)} == {"score", "passes if equally good", "votes for 80 % power"}
    assert (folder / "arena.sqlite").is_file()
    assert run(["bench", "opening", *words, "--run", str(folder)]) == 2
    assert "new or empty folder" in capsys.readouterr().err

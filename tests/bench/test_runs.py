"""What benchmark commands share: runs that go on, records, tables, and options that are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tersor.bench.measure import Estimate
from tersor.bench.records import Record, read_jsonl
from tersor.bench.runs import (
    Finished,
    cell,
    demo_records,
    markdown,
    progress_file,
    record_maker,
    report_records,
    show,
    whole_numbers,
)


@dataclass(frozen=True)
class Plan:
    samples: int


@dataclass(frozen=True)
class Score:
    value: float


def test_parts_that_are_finished_are_not_run_again(tmp_path: Path) -> None:
    file, ran = tmp_path / "out.partial", []

    def run(part: str) -> Score:
        ran.append(part)
        if ran.count("c") == 1 and part == "c":
            raise KeyboardInterrupt
        return Score(len(ran))

    def whole() -> list[Score]:
        done = Finished(file, Plan(3), lambda kept: Score(**kept))
        return [done.once(part, lambda part=part: run(part)) for part in "abc"]

    with pytest.raises(KeyboardInterrupt):
        whole()
    assert whole() == [Score(1), Score(2), Score(4)]
    assert ran == ["a", "b", "c", "c"]
    with pytest.raises(ValueError, match="other settings; remove it"):
        Finished(file, Plan(4), lambda kept: Score(**kept))
    in_memory = Finished(None, Plan(3), lambda kept: Score(**kept))
    assert in_memory.once("a", lambda: Score(7)) == in_memory.once("a", lambda: Score(8)) == Score(7)


def test_the_progress_file_goes_when_all_is_done_and_stays_otherwise(tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    with progress_file(out) as file:
        assert file == tmp_path / "records.jsonl.partial"
        file.write_text("{}")
    assert not file.exists()
    with pytest.raises(KeyboardInterrupt), progress_file(out) as file:
        file.write_text("{}")
        raise KeyboardInterrupt
    assert file.exists()
    with progress_file(None) as nothing:
        assert nothing is None


def test_records_share_what_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tersor", "bench", "kv", "--text", "a b"])
    make = record_maker("zipcache", model="tiny-lm", seed=3)
    plain = make("4/2", "recall", "share", Estimate(0.5, 0.4, 0.6, "95% bootstrap"), 10)
    assert isinstance(plain, Record) and plain.command == "tersor bench kv --text 'a b'"
    assert (plain.measured, plain.low, plain.high, plain.n, plain.seed) == (0.5, 0.4, 0.6, 10, 3)
    assert plain.claim is plain.peer is plain.verdict is None and plain.shapes == "trained"
    other = make("4/2", "bytes", "x", 4, None, model="another", baseline=1.0, verdict="holds")
    assert (other.model, other.low, other.baseline, other.verdict, other.n) == ("another", None, 1.0, "holds", None)
    assert demo_records("zipvl", "tiny-vlm")("i", "q", "", 1, 1).command == "tersor demo --only zipvl"


def test_records_are_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_maker("kv", model="m", seed=0)("item", "recall", "share", 1.0, 2)
    report_records([record], tmp_path / "r.jsonl", True, lambda: pytest.fail("the table was not asked for"))
    assert read_jsonl(tmp_path / "r.jsonl") == [record]
    assert Record.from_json(capsys.readouterr().out) == record
    report_records([record], None, False, lambda: print("table"))
    assert capsys.readouterr().out == "table\n"


def test_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show(("cache", "kind", "recall"), [("a", "b", "1"), ("long", "x", "22")], names=2, title="all")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "all" in lines[0] and "  a       b           1" in lines and "  long    x          22" in lines
    assert cell(Estimate(0.5, 0.25, 1.0, "95% Wilson"), ".1f", factor=100) == "50.0 [25.0, 100.0]"
    assert markdown(("", "n"), [("one", 1), ("", "")]) == ["| | n |", "|---|---:|", "| one | 1 |", "| | |"]


def test_numbers_of_an_option() -> None:
    assert whole_numbers("--batches", "1, 4,16") == [1, 4, 16]
    assert whole_numbers("--batches", "") == []
    for text in ("1,x", "-1", "0.5"):
        with pytest.raises(ValueError, match=r"--batches .* must be whole numbers with commas"):
            whole_numbers("--batches", text)
    with pytest.raises(ValueError, match="whole numbers"):
        whole_numbers("--batches", "0", least=1)

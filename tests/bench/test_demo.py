"""The demo with few samples: records, verdicts and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tersor.bench import demo_minicache, demo_zipcache
from tersor.bench.demos import DEMOS, get_demo
from tersor.bench.kv import Scores
from tersor.bench.records import Record, read_jsonl
from tersor.cli import run


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (demo_zipcache, demo_minicache):
        monkeypatch.setattr(each, "SAMPLES_PER_TASK", 2)
        monkeypatch.setattr(each, "CONTINUATIONS", 2)


def test_demo_writes_table_page_and_records(small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    assert run(["demo", "--only", "zipcache", "--out", str(out)]) == 0
    assert "zipcache" in capsys.readouterr().out
    records = read_jsonl(out / "records.jsonl")
    assert {record.system for record in records} == {"zipcache"}
    assert records[0].claim == -0.38
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")


def test_demo_prints_json(small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--json", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [Record.from_json(line) for line in lines] == read_jsonl(tmp_path / "records.jsonl")
    assert all(isinstance(json.loads(line), dict) for line in lines)


@pytest.mark.parametrize(
    ("ours", "peer", "verdict"), [(100, 60, "holds"), (100, 100, "partly"), (99, 60, "partly"), (80, 60, "fails")]
)
def test_the_verdict_follows_from_the_numbers(ours: int, peer: int, verdict: str) -> None:
    """Of 100 right answers; one lost is more than half a point, but the interval does not exclude half a point."""

    def scores(right: int) -> Scores:
        return Scores([1.0] * right + [0.0] * (100 - right), 100, 400)

    recall = {name: scores(peer) for name in demo_zipcache.SHOWN}
    recall[demo_zipcache.FULL], recall[demo_zipcache.OURS] = scores(100), scores(ours)
    times = demo_zipcache.time_paired({"full": list, "ZipCache": list}, repeats=3)
    assert demo_zipcache._records(recall, recall, times)[0].verdict == verdict


def test_every_demo_is_importable() -> None:
    assert all(callable(get_demo(name)) for name in DEMOS)

"""The demo with few samples: records, verdicts and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tersor.bench.measure import Estimate
from tersor.bench.records import Record, read_jsonl
from tersor.cli import DEMOS, get_demo, run
from tersor.grids.zipar import demo as demo_zipar
from tersor.kv.bench.recall import Scores
from tersor.kv.demos import minicache as demo_minicache
from tersor.kv.demos import zipcache as demo_zipcache
from tersor.kv.demos import zipvl as demo_zipvl
from tersor.ptq import demo as demo_ptq
from tersor.ptq.bench import speed as ptq_speed
from tersor.ptq.networks import RepNetConfig


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (demo_zipcache, demo_minicache):
        monkeypatch.setattr(each, "SAMPLES_PER_TASK", 2)
        monkeypatch.setattr(each, "CONTINUATIONS", 2)
    monkeypatch.setattr(demo_zipvl, "SAMPLES_PER_KIND", 2)
    monkeypatch.setattr(demo_zipar, "SAMPLES", 10)
    monkeypatch.setattr(demo_zipar, "ROUNDS", 1)
    for name, value in (("PHOTOS", 1), ("FIRST", 8), ("ITERATIONS", 1), ("ROUNDS", 1)):
        monkeypatch.setattr(demo_ptq, name, value)
    tiny = RepNetConfig(stem=8, widths=(8,), depths=(1,), strides=(2,), image_size=32)
    monkeypatch.setitem(ptq_speed.SHAPES, "repvgg_a0", tiny)


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


def test_zipar_shows_images_and_judges_them(small, tmp_path: Path) -> None:
    assert run(["demo", "--only", "zipar", "--out", str(tmp_path), "--json"]) == 0
    records = read_jsonl(tmp_path / "records.jsonl")
    assert (records[0].claim, records[0].measured, records[0].baseline) == (713, 713, 8190)
    assert [record.peer_name for record in records if record.unit == "x"] == ["if time were passes"] * 3
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    # One for each pass; the adaptive window takes as many as it needs.
    assert page.count("<animate ") > 196 + 136 + 52
    assert page.count("data:image/png;base64,") == 8


@pytest.mark.parametrize(("value", "high", "verdict"), [(-1, 1, "holds"), (-3, -1, "partly"), (-9, -5, "fails")])
def test_zipar_may_lose_two_points(value: float, high: float, verdict: str) -> None:
    assert demo_zipar.judge_loss(Estimate(value, value - 1, high, "95% bootstrap")) == verdict


def test_zipvl_shows_what_each_layer_keeps(small, tmp_path: Path) -> None:
    assert run(["demo", "--only", "zipvl", "--out", str(tmp_path), "--json"]) == 0
    records = read_jsonl(tmp_path / "records.jsonl")
    assert records[0].claim == -0.2
    assert records[0].peer_name == "random tokens, as many a layer"
    kept = next(record for record in records if record.quantity == "tokens in attention")
    assert 0 < kept.measured < 1
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("layer 0:") == 2

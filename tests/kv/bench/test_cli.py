"""`tersor bench kv`, `quantizers`, `saliency` and `merging`: records by hand-made scores, runs that go on, refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from invoke import run as invoke

from tersor.bench.records import Record, read_jsonl
from tersor.cli import app, run
from tersor.kv.bench import layouts, merging_curves, pair_recall, recall
from tersor.kv.bench.contenders import FULL, peers
from tersor.kv.bench.peers import unavailable
from tersor.kv.bench.recall import Scores
from tersor.kv.bench.tasks import PLANTED
from tersor.zoo import loading

BENCH = ["bench", "kv", "--samples", "2", "--continuations", "2", "--task", "needle", "--context-bytes", "256"]


PAIR = ["--contender", "ZipCache 4/2 r=0.6", "--contender", "uniform 2-bit"]


def test_bench_kv_writes_records_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kv.jsonl"
    assert run([*BENCH, *PAIR, "--out", str(out), "--json"]) == 0
    printed = [Record.from_json(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == read_jsonl(out)
    assert {record.item.split(":")[0] for record in printed} == {"full cache", "ZipCache 4/2 r=0.6", "uniform 2-bit"}
    assert list(tmp_path.iterdir()) == [out]
    assert run([*BENCH, *PAIR]) == 0
    assert "ZipCache 4/2 r=0.6" in capsys.readouterr().out


def test_bench_kv_resumes_and_refuses_another_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "kv.jsonl"
    arguments = [*BENCH, "--task", "quote", *PAIR, "--out", str(out)]
    real, calls = recall.score_recall, []

    def dies_at_the_second_task(*args, **kwargs):
        calls.append(args[2][0].task)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return real(*args, **kwargs)

    monkeypatch.setattr(recall, "score_recall", dies_at_the_second_task)
    assert run(arguments) == 1
    assert "power cut" in capsys.readouterr().err
    assert run([*arguments, "--seed", "9"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert run(arguments) == 0
    assert calls == ["needle", "quote", "quote"]


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["--task", "chess"], "choose from"),
        (["--contender", "magic"], "choose from"),
        (["--mode", "blind"], "'aware' or 'agnostic'"),
        (["--samples", "0"], "at least 1"),
        (["--text", "/no/such/file"], "no such file"),
        (["--context-bytes", "10"], "context_bytes"),
    ],
)
def test_bench_kv_refuses_bad_input(arguments: list[str], mention: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "kv", *arguments]) == 2
    assert mention in capsys.readouterr().err


def test_the_command_adds_peers_and_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    options = ["kv", "--peers", "--contender", "uniform 4-bit", "--task", "needle", "--samples", "1"]
    result = invoke(app, "bench", *options, "--continuations", "0", "--context-bytes", "256")
    assert result.exit_code == 0, result.output
    names = [each.name for each in peers()]
    rows = [line.split("  ")[1].strip() for line in result.stdout.splitlines() if line.startswith("  ")]
    assert [row for row in rows if row in {FULL, "uniform 4-bit", *names}] == [FULL, "uniform 4-bit", *names]
    for name, reason in unavailable().items():
        assert f"{name} was not run: {reason[:40]}" in result.stdout


def scores(*values: float, size: int = 100) -> Scores:
    """Of a cache whose dense form takes 400 bytes."""
    return Scores(list(values), size, 400)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Nothing is loaded, and what the commands ask for is noted."""
    asked: dict[str, Any] = {}
    network = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=8))
    monkeypatch.setattr(loading, "load", lambda *_: (network, SimpleNamespace(encode=list)))
    monkeypatch.setenv("COLUMNS", "200")
    return asked


def printed(*arguments: str) -> dict[tuple[str, str], Record]:
    """The records of a command, by item and quantity."""
    found = [Record.from_json(line) for line in invoke(app, "bench", *arguments, "--json").stdout.splitlines()]
    return {(record.item, record.quantity): record for record in found}


def test_a_layout_is_compared_with_the_exact_cache_under_its_own_stress(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_stress = {
        "none": {"exact": scores(1.0, 2.0), "ours": scores(1.5, 2.5)},
        "shift": {"exact": scores(3.0, 3.0), "ours": scores(4.0, 5.0)},
    }
    monkeypatch.setattr(layouts, "score_layouts", lambda *_, **options: told.update(options) or by_stress)
    found = printed("quantizers", "--bits", "2", "--passages", "7", "--seed", "3")
    assert told == {"n": 7, "bits": 2, "seed": 3}
    quantity = "loss against the exact cache"
    assert {key: record.measured for key, record in found.items()} == {
        ("ours, 2-bit: none", quantity): 0.5, ("ours, 2-bit: shift", quantity): 1.5,
    }  # fmt: skip
    assert all((each.n, each.baseline, each.seed, each.model) == (2, 0.0, 3, "tiny-lm") for each in found.values())
    table = invoke(app, "bench", "quantizers").stdout.splitlines()
    assert [line.split() for line in table if line.split()[:1] in (["exact"], ["ours"])] == [
        ["exact", "1.5000", "3.0000"], ["ours", "2.0000", "4.5000"],
    ]  # fmt: skip


def test_saliency_is_recall_and_compression_of_each_cache(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored(model: Any, rivals: list, **options: Any) -> dict[str, Scores]:
        told.update(options, rivals=[each.name for each in rivals])
        return {FULL: scores(1.0, 1.0, 1.0, 0.0, size=400), "uniform 4-bit": scores(1.0, 0.0, 0.0, 0.0, size=80)}

    monkeypatch.setattr(pair_recall, "score_pairs", scored)
    found = printed("saliency", "--samples", "9", "--contender", "uniform 4-bit", "--seed", "5")
    assert told == {"n": 9, "seed": 5, "rivals": [FULL, "uniform 4-bit"]}
    right = found["uniform 4-bit: pair recall", "recall"]
    assert (right.measured, right.baseline, right.unit, right.n) == (0.25, 0.75, "share", 4)
    smaller = found["uniform 4-bit: pair recall", "compression of a 16-bit cache"]
    assert (smaller.measured, smaller.baseline) == (5.0, 1.0)
    assert {record.model for record in found.values()} == {"tiny-recall"}
    assert len(found) == 4


@pytest.mark.parametrize(
    ("compare", "merged"),
    [("pairs", [(0, 1), (2, 3), (4, 5), (6, 7)]), ("bytes", [(2, 3), (4, 5), (6, 7)])],
)
def test_merging_makes_every_later_layer_of_a_pair_longer(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch, compare: str, merged: list
) -> None:
    """Recall is pooled over the tasks with planted facts, and the added loss is that against the full cache."""
    monkeypatch.setattr(
        merging_curves, "with_longer_layers", lambda model, layers: told.update(longer=[*layers]) or model
    )
    for way in ("merging_contenders", "stacked_contenders"):
        monkeypatch.setattr(merging_curves, way, lambda pairs, way=way: told.update(pairs=list(pairs), way=way) or [])
    monkeypatch.setattr(recall, "score_recall", lambda *_: {FULL: scores(1.0, 1.0, size=400), "ours": scores(1.0, 0.0)})
    monkeypatch.setattr(
        recall, "score_continuation", lambda *_, **options: {FULL: scores(1.0, 2.0), "ours": scores(1.25, 2.5)}
    )
    found = printed("merging", "--compare", compare, "--samples", "2", "--continuations", "2")
    assert told["longer"] == [3, 5, 7]
    assert (told["pairs"], told["way"][0]) == (merged, "m" if compare == "pairs" else "s")
    assert found["ours: added loss", "loss against the full cache"].measured == 0.375
    assert found["ours: continuation", "loss"].measured == 1.875
    pooled = found["ours: planted facts", "recall, agnostic"]
    assert (pooled.measured, pooled.baseline, pooled.n) == (0.5, 1.0, 2 * len(PLANTED))
    table = invoke(app, "bench", "merging", "--compare", compare).stdout
    row = next(line for line in table.splitlines() if line.strip().startswith("ours"))
    assert row.split()[1:3] == ["4.00", "50.0"] and row.split()[-1] == "1.8750"


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["quantizers", "--bits", "3"], "2, 4 or 8"),
        (["quantizers", "--passages", "0"], "at least 1"),
        (["saliency", "--samples", "0"], "at least 1"),
        (["saliency", "--contender", "magic"], "choose from"),
        (["merging", "--compare", "layers"], "'pairs' or 'bytes'"),
        (["merging", "--samples", "0"], "at least 1"),
        (["merging", "--continuations", "0"], "at least 1"),
        (["kv", "--continuations", "-1"], "at least 0"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], mention: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert mention in error and len(error.splitlines()) == 1

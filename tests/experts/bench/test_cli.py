"""`tersor experts bench`: records of every part, its table, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tersor.bench.measure import Estimate, wilson_interval
from tersor.cli import run
from tersor.experts.bench import cli, quality, routing
from tersor.experts.bench.quality import Kept


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def test_every_part_gives_records(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parts = [part for name in ("decode", "switch", "mixed", "registered", "load") for part in ("--what", name)]
    out = tmp_path / "speed.jsonl"
    assert run(["experts", "bench", *parts, "--shape", "tiny", "--repeats", "3", "--out", str(out), "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [json.loads(line) for line in out.read_text().splitlines()] == told
    known = {(row["item"], row["quantity"]): row for row in told}
    assert known["decoding one row", "time per token over the base's"]["peer"] > 1
    assert known["switching among resident experts", "time of a switch"]["measured"] < 1
    assert known["8 rows of 4 experts", "time of four passes over that of one batch"]["measured"] > 0
    assert (
        known["1 experts registered", "tokens per second"]["baseline"]
        == known["16 experts registered", "tokens per second"]["baseline"]
    )
    assert known["from cold files until loaded", "time of a whole model over that of a delta"]["peer"] > 1
    assert all("random, tiny" in row["shapes"] for row in told)


def test_the_table(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["experts", "bench", "--what", "switch", "--shape", "tiny"]) == 0
    assert "time of a switch" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--what", "all"], ["--shape", "huge"], ["--repeats", "0"], ["--bits", "5"]])
def test_bad_input(options: list[str], capsys: pytest.CaptureFixture) -> None:
    assert run(["experts", "bench", *options]) == 2
    assert capsys.readouterr().err.startswith("tersor: ")


def test_quality_is_of_the_hardest_expert_and_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    hardest = torch.nn.Linear(3, 4)  # 16 numbers, of 2 bytes each
    family = SimpleNamespace(experts={cli.HARDEST: hardest, "sort": torch.nn.Linear(9, 9)})
    monkeypatch.setattr(quality.Family, "load", lambda: family)

    def table(asked: Any, skill: str, *, n: int, seed: int) -> list:
        assert (asked, skill, n, seed) == (family, cli.HARDEST, cli.PROMPTS, cli.HELD_OUT_SEED)
        return [("2-bit", Kept([True, True, True, False], [True] * 4, [0.1, 0.2, 0.3, 0.4], 10))]

    monkeypatch.setattr(quality, "quality_table", table)
    share = wilson_interval(3, 8)
    monkeypatch.setattr(quality, "planted_recalls", lambda asked: {("fisher", 2): (share, 8)})
    exact, divergence, size, planted = cli._quality(lambda doing: None)
    assert (exact.item, exact.measured, exact.n, exact.baseline) == ("2-bit", 0.75, 4, 1.0)
    assert (divergence.measured, divergence.baseline) == (pytest.approx(0.25), 0.0)
    assert (size.measured, size.baseline, size.unit) == (10.0, 32.0, "bytes")
    assert (planted.item, planted.measured, planted.n) == ("by fisher, k=2", share.value, 8)
    assert [exact.seed, planted.seed] == [cli.HELD_OUT_SEED, cli.SEED]


def test_the_router_is_compared_with_n_grams_and_with_the_best_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(right: int) -> SimpleNamespace:
        between = Estimate(-0.1, -0.2, 0.0, "95% bootstrap")
        end = SimpleNamespace(
            routed=wilson_interval(right, 10), oracle=wilson_interval(9, 10), best_single=wilson_interval(4, 10),
            best_name="sort", gap=between,
        )  # fmt: skip
        return SimpleNamespace(
            n=10, accuracy=wilson_interval(right, 10), calibration_error=0.05, end_task=end,
            seconds=Estimate(0.002, 0.001, 0.003, "quartiles"), confusion=[[3, 1], [2, 4]],
            recall={"add": wilson_interval(3, 4), "sort": wilson_interval(4, 6)},
        )  # fmt: skip

    asked: list[bool] = []

    def route(*, unseen: bool, n: int, seed: int) -> dict[str, Any]:
        assert (n, seed) == (cli.REQUESTS, cli.HELD_OUT_SEED)
        asked.append(unseen)
        return {routing.ENCODER: found(8), routing.NGRAMS: found(5)}

    monkeypatch.setattr(routing, "route_requests", route)
    records = {(row.item, row.quantity): row for row in cli._router(lambda doing: None)}
    assert asked == [False, True]
    assert len(records) == 2 * 2 * 7
    for where in ("templates of the training", "unseen templates"):
        ours = records[f"encoder: {where}", "right expert"]
        assert (ours.measured, ours.peer, ours.peer_name) == (0.8, 0.5, "n-grams")
        assert records[f"n-grams: {where}", "right expert"].peer is None
        time = records[f"encoder: {where}", "time of a request"]
        assert (time.measured, time.low, time.high, time.unit) == (2.0, 1.0, 3.0, "ms")
        answered = records[f"encoder: {where}", "answered right"]
        assert (answered.measured, answered.baseline, answered.peer) == (0.8, 0.9, 0.4)
        assert answered.peer_name == "always sort"
        assert records[f"encoder: {where}", "answered right, less the best choice"].measured == -0.1
        for name, right, total in (("add", 3, 4), ("sort", 4, 6)):
            row = records[f"encoder: {where}, requests for {name}", "right expert"]
            assert (row.measured, row.n) == (right / total, total)

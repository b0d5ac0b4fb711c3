"""`tersor bench intjudge`: one short training of everything, resumed."""

from __future__ import annotations

import json

import pytest

from tersor.bench.records import read_jsonl
from tersor.cli import run
from tersor.opening.bench import intjudge
from tersor.opening.bench.cli_intjudge import QUANTITIES


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = intjudge.Plan(labels=4, ratio=1.0, steps=1, rows=4, instances=40)
    monkeypatch.setattr(intjudge, "Plan", lambda **changes: plan)


def test_a_table_of_two_ways_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys) -> None:
    out, asked = tmp_path / "rows.jsonl", []
    command = ["bench", "intjudge", "--seeds", "1", "--samples", "10", "--out", str(out), "--json"]
    arms = ["--arm", intjudge.BOTH, "--arm", intjudge.UNTRAINED]
    train = intjudge.train_arm

    def stopped(arm, *args):
        asked.append(arm)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return train(arm, *args)

    monkeypatch.setattr(intjudge, "train_arm", stopped)
    assert run([*command, *arms]) == 130
    assert run([*command, *arms]) == 0
    assert asked == [intjudge.BOTH, intjudge.UNTRAINED, intjudge.UNTRAINED]
    records = read_jsonl(out)
    assert [json.loads(line)["item"] for line in capsys.readouterr().out.splitlines()] == [r.item for r in records]
    known = {(each.item, each.quantity): each for each in records}
    for quantity in QUANTITIES.values():
        assert 0 <= known[intjudge.BOTH, quantity].measured <= 1
    assert (intjudge.UNTRAINED, QUANTITIES["blank"]) not in known
    assert known[intjudge.BOTH, "pairs of the training from people"].measured == 4
    assert any("people's votes and the judge" in each.item for each in records)


def test_what_is_no_way_or_too_few_is_refused(capsys) -> None:
    assert run(["bench", "intjudge", "--arm", "x"]) == 2
    assert run(["bench", "intjudge", "--samples", "1"]) == 2
    assert "--samples 1 must be at least 10" in capsys.readouterr().err


def test_the_coin_keeps_the_pairs_and_every_way_has_the_same_tests(tmp_path) -> None:
    plan = intjudge.Plan()
    both, tests = intjudge.data(plan, 0, 10, tmp_path, labels=1, references=True)
    coin, again = intjudge.data(plan, 0, 10, tmp_path, labels=1, references=True, coin=True)
    alone, others = intjudge.data(plan, 0, 10, tmp_path, labels=1)
    assert tests == again == others and len(alone) == 4 and len(both) == 8
    assert [pair.verdict.battle for pair in both] == [pair.verdict.battle for pair in coin]
    texts = [[step.text for step in pair.first] == [step.text for step in pair.second] for pair in tests["colours"]]
    assert all(texts) and all(len(pair.first) == len(pair.second) for pair in tests["colours"])

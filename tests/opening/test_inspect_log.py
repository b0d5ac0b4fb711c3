"""The structure that Inspect's reader asks for, field by field; Inspect itself is not needed."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from arena_runs import decided, make_run

from tersor.opening.inspect_log import inspect_log
from tersor.opening.ranking import METRICS, rate, tallies
from tersor.opening.records import Raw
from tersor.opening.store import Store


def test_the_log_has_the_fields_of_version_two_in_their_order(tmp_path: Path) -> None:
    judge = decided(tmp_path)
    with Store.open(tmp_path) as store:
        log = json.loads(inspect_log(store, judge))
        battles, verdicts = store.battles(), store.verdicts(judge)
    assert list(log) == ["version", "status", "eval", "plan", "results", "stats", "samples"]
    assert (log["version"], log["status"]) == (2, "success")
    assert {"created", "task", "dataset", "model", "config"} <= set(log["eval"]), "required"
    assert log["eval"]["model"] == judge and datetime.fromisoformat(log["eval"]["created"]).tzinfo
    assert log["eval"]["dataset"]["sample_ids"] == [each.id for each in battles]
    assert [each["id"] for each in log["samples"]] == [each.id for each in battles]
    standing = tallies(verdicts)
    for score, metric in zip(log["results"]["scores"], METRICS, strict=True):
        assert (score["name"], score["scorer"]) == (metric, "pairwise")
        found = {name: each["value"] for name, each in score["metrics"].items()}
        assert found == {m: v for m, t in standing.items() if (v := rate(t, metric)) is not None}


def test_a_sample_is_a_battle_with_its_pictures_its_score_and_what_was_said(tmp_path: Path) -> None:
    judge = decided(tmp_path)
    with Store.open(tmp_path) as store:
        log = json.loads(inspect_log(store, judge))
        verdicts = {each.battle: each for each in store.verdicts(judge)}
        battles = {each.id: each for each in store.battles()}
    for sample in log["samples"]:
        assert {"id", "epoch", "input", "target", "messages"} <= set(sample) and sample["epoch"] == 1
        (message,) = sample["input"]
        assert message["role"] == "user" and {part["type"] for part in message["content"]} <= {"text", "image"}
        assert all(p["image"].startswith("data:image/jpeg;base64,") for p in message["content"] if p["type"] == "image")
        score, verdict, battle = sample["scores"]["pairwise"], verdicts[sample["id"]], battles[sample["id"]]
        assert (sample["metadata"]["a"], score["answer"]) == (battle.a, verdict.label)
        assert score["value"] == {"A": 1.0, "B": 0.0}.get(verdict.label, 0.5)
        assert "A first: " in score["explanation"] and "B first: " in score["explanation"]


def test_a_run_that_is_not_done_says_so_and_a_battle_without_verdict_has_no_score(tmp_path: Path) -> None:
    make_run(tmp_path, battles=3)
    with Store.open(tmp_path) as store:
        store.add_judge("endpoint:m")
        one, two, _ = store.battles()
        rows = [Raw(one.id, "endpoint:m", label="B"), Raw(two.id, "endpoint:m", status="unparsed", text="hm")]
        store.record(rows).result()
        log = json.loads(inspect_log(store, "endpoint:m"))
    assert log["status"] == "cancelled"
    assert ["scores" in each for each in log["samples"]] == [True, False]
    assert (log["results"]["total_samples"], log["results"]["completed_samples"]) == (2, 1)
    assert "hm" in log["samples"][1]["messages"][1]["content"]

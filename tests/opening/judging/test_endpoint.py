"""A judge behind an endpoint: every fault has its answer, and none becomes a label."""

from __future__ import annotations

import resource
import time

import pytest
from arena import fill
from mock_judge import FLAKY, running

from tersor._errors import TersorError
from tersor.opening.judging.client import EndpointRefusedError
from tersor.opening.judging.endpoint import EndpointJudge
from tersor.opening.judging.runner import run_judge
from tersor.opening.prompts import JudgePrompt
from tersor.opening.records import Battle
from tersor.opening.store import Store

SMALL = JudgePrompt(side=112)


def judge(server, **settings) -> EndpointJudge:
    values = {"backoff": 0.01, "concurrency": 4, "timeout": 5.0} | settings
    return EndpointJudge(settings.pop("base", server.base), values.pop("model", "mock"), SMALL, **{
        key: value for key, value in values.items() if key != "base"})  # fmt: skip


def labels(store: Store, name: str = "endpoint:mock") -> dict:
    return {(row.battle, row.order): row.label for row in store.raw(name)}


@pytest.fixture
def true_labels(run) -> dict:
    with running() as server:
        run_judge(run, judge(server))
    found = labels(run)
    run.forget([each.id for each in run.battles()])
    return found


def test_both_orders_are_asked_once_and_agree(run) -> None:
    with running() as server:
        outcome = run_judge(run, judge(server))
        assert (outcome.battles, outcome.decided, outcome.asked) == (20, 20, 40)
        assert run_judge(run, judge(server)).asked == 0
        assert server.stats()["requests"] == 40
    assert all(each.consistent for each in run.verdicts("endpoint:mock"))
    row = run.raw("endpoint:mock")[0]
    assert (row.tokens_in, row.tokens_out, row.attempts, row.status) == (100, 4, 1, "ok")
    assert run.prompts("endpoint:mock") == {SMALL.hash: SMALL.text}


def test_a_flaky_endpoint_gives_the_labels_of_a_sound_one(run, true_labels, monkeypatch) -> None:
    monkeypatch.setenv("MOCK_KEY", "sesame")
    with running(faults=FLAKY, hang=0.6, thoughts=0.1, parts=0.2, key="sesame") as server:
        outcome = run_judge(run, judge(server, key_env="MOCK_KEY", timeout=0.4))
        stats = server.stats()
    found = labels(run)
    assert len(found) == 40
    assert outcome.statuses["ok"] >= 38
    assert all(label in (None, true_labels[key]) for key, label in found.items())
    assert stats["early"] == 0 < stats["waited"] and stats["most_open"] <= 4 + stats["faults"].get("hang", 0)
    assert {"429 wait", "500", "hang"} <= set(stats["faults"])


@pytest.mark.slow
def test_a_thousand_battles_at_a_flaky_endpoint(store, mini_root, monkeypatch) -> None:
    monkeypatch.setenv("MOCK_KEY", "sesame")
    fill(store, mini_root, ["best", "good", "poor"])
    grow(store, 1000)
    with running() as server:
        run_judge(store, judge(server, concurrency=16), rep=1)
    wanted = {(row.battle, row.order): row.label for row in store.raw("endpoint:mock", rep=1)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with running(faults=FLAKY, hang=1.0, thoughts=0.1, parts=0.1, key="sesame") as server:
        own = judge(server, key_env="MOCK_KEY", timeout=0.5, concurrency=16)
        outcome = run_judge(store, own)
        while outcome.statuses.get("error"):
            outcome = run_judge(store, own)
        stats = server.stats()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    rows = store.raw("endpoint:mock", rep=0)
    print(f"{stats}, {outcome.statuses}, {grown / 1024:.1f} MB more memory")
    assert len(rows) == 2000 and sum(row.label is None for row in rows) <= 10
    assert all(row.label in (None, wanted[row.battle, row.order]) for row in rows)
    assert stats["early"] == 0 and stats["waited"] > 0.8 * stats["faults"]["429 wait"]
    assert stats["most_open"] <= 16 + stats["faults"]["hang"] and grown < 40 * 1024


@pytest.mark.parametrize("prefix", ["/v1", "", "/openai/deployments/x"])
def test_the_base_may_be_given_in_every_way(run, prefix) -> None:
    with running(prefix=prefix) as server:
        for base in {f"{server.base}{prefix}/chat/completions", f"{server.base}{prefix}/" if prefix else None}:
            if base is not None:
                assert judge(server, base=base).check(question(run)).label is not None
        if prefix == "/v1":
            assert judge(server).check(question(run)).label is not None


def question(store: Store):
    from tersor.opening.judging.base import Question

    battle, instances = store.battles()[0], {each.uid: each for each in store.instances()}
    first, second = (store.outputs(name)[battle.uid] for name in (battle.a, battle.b))
    return Question(battle, 0, instances[battle.uid], first, second)


STOPS = {
    "wrong key": ({"key": "sesame"}, {"key_env": "MOCK_WRONG"}, "answers 401.*holds a key that is refused"),
    "no key": ({"key": "sesame"}, {"key_env": "MOCK_NONE"}, "answers 401.*MOCK_NONE is not set"),
    "wrong model": ({}, {"model": "gpt"}, "answers 404.*check model 'gpt'"),
    "wrong path": ({"prefix": "/other"}, {}, "answers 404.*--base-url with all of its path"),
    "bad request": ({"always": "bad request"}, {}, "answers 400: I do not like it"),
}


@pytest.mark.parametrize("name", STOPS)
def test_what_no_other_question_can_mend_stops_the_run(run, monkeypatch, name) -> None:
    monkeypatch.setenv("MOCK_WRONG", "open-sea")
    settings, own, said = STOPS[name]
    with running(**settings) as server:
        with pytest.raises(EndpointRefusedError, match=said) as error:
            run_judge(run, judge(server, **own))
        assert server.stats()["requests"] <= 2 * 4
        with pytest.raises(EndpointRefusedError, match=said):
            judge(server, **own).check(question(run))
    assert "open-sea" not in str(error.value)
    assert b"open-sea" not in run.file.read_bytes()


def test_a_server_that_is_not_there_leaves_errors_that_the_next_run_mends(run) -> None:
    with running() as server:
        pass
    outcome = run_judge(run, judge(server))
    assert outcome.statuses == {"error": 40} and outcome.missing == 1.0
    with running() as server:
        assert run_judge(run, judge(server)).statuses == {"ok": 40}


STATUSES = {
    "prose": ("unparsed", 3), "refusal": ("refused", 1), "500": ("error", 6), "no choices": ("error", 6),
    "truncated": ("error", 6), "too large": ("too_large", 1),
}  # fmt: skip


@pytest.mark.parametrize("fault", STATUSES)
def test_each_lasting_fault_has_a_status_and_no_label(run, fault) -> None:
    status, attempts = STATUSES[fault]
    with running(always=fault) as server:
        outcome = run_judge(run, judge(server), orders="one")
        assert outcome.statuses == {status: 20} and outcome.decided == 0
    assert {row.attempts for row in run.raw("endpoint:mock")} == {attempts}
    assert all(row.label is None and row.text for row in run.raw("endpoint:mock"))


def test_pictures_shrink_until_the_server_takes_them(run) -> None:
    with running(always="too large once") as server:
        large = EndpointJudge(server.base, "mock", JudgePrompt(side=512), backoff=0.01)
        outcome = run_judge(run, large, orders="one")
    assert set(outcome.statuses) <= {"ok", "too_large"}


def test_a_judge_that_thinks_first_gets_the_tokens_for_it(run, true_labels) -> None:
    with running(thoughts=1.0) as server:
        thinker = judge(server)
        run_judge(run, thinker)
        assert thinker.tokens == 4096
        assert server.stats()["requests"] <= 40 + 4  # those that were open when it was first noticed
        assert labels(run) == true_labels
        run.forget([each.id for each in run.battles()])
        assert run_judge(run, judge(server, max_tokens=16)).statuses == {"unparsed": 40}


def test_newer_models_get_the_fields_that_they_want(run) -> None:
    with running(always="new fields") as server:
        assert judge(server).check(question(run)).label is not None


def test_retry_after_may_be_a_date(run) -> None:
    with running(always="429 date", wait=1.0) as server:
        began = time.monotonic()
        assert run_judge(run, judge(server, concurrency=40)).statuses == {"ok": 40}
        assert time.monotonic() - began >= 1.0
        stats = server.stats()
        assert stats["early"] == 0 < stats["waited"]


def test_probabilities_of_the_first_token_decide_what_both_orders_leave_open(run) -> None:
    with running() as server:
        run_judge(run, judge(server, logprobs=True), orders="one")
    assert {round(row.probability, 3) for row in run.raw("endpoint:mock")} == {0.7}


def test_addresses_with_keys_or_of_another_kind_are_refused() -> None:
    for base in ("ftp://x", "x", "http://"):
        with pytest.raises(TersorError, match="must start with"):
            EndpointJudge(base, "m")
    for base in ("https://me:secret@x", "https://x/v1?key=secret"):
        with pytest.raises(TersorError, match="must hold no key") as error:
            EndpointJudge(base, "m")
        assert "secret" not in str(error.value)


def grow(store: Store, count: int) -> None:
    """Many battles on few instances: their names differ, so their answers do."""
    have = store.battles()
    store.add_battles(
        Battle(f"{number:016x}", each.uid, each.task, each.a, each.b)
        for number, each in ((number, have[number % len(have)]) for number in range(count - len(have)))
    )


def measure(store: Store, battles: int, concurrency: int) -> tuple[float, float, int, dict]:
    """Verdicts a second, by the clock and by the seconds that this process worked; bytes more; what the server saw."""
    grow(store, battles)
    with running(latency=0.005) as server:
        run_judge(store, judge(server, concurrency=concurrency), orders="one", rep=7)
        store.forget([each.id for each in store.battles()])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began, worked = time.monotonic(), time.process_time()
        outcome = run_judge(store, judge(server, concurrency=concurrency))
        seconds, worked = time.monotonic() - began, time.process_time() - worked
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert outcome.decided == battles and outcome.statuses == {"ok": 2 * battles}
        stats = server.stats()
    assert stats["most_open"] <= concurrency
    return 2 * battles / seconds, 2 * battles / worked, grown, stats


def test_no_more_requests_are_open_than_allowed(run) -> None:
    rate, *_ = measure(run, 100, 16)
    assert rate > 20


@pytest.mark.slow
def test_5000_battles_at_64_requests_at_once(store, mini_root) -> None:
    fill(store, mini_root, ["best", "good", "poor"])
    rate, own, grown, stats = measure(store, 5000, 64)
    print(
        f"{rate:.0f} verdicts a second, {own:.0f} a second of work, {grown / 1024:.1f} MB more memory, at most "
        f"{stats['most_open']} open"
    )
    assert own >= 300  # by the clock it depends on what else the machine does
    assert grown < 40 * 1024
    assert store.read("PRAGMA integrity_check") == [("ok",)]

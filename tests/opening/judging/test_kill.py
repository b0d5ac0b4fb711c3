"""A run that is killed, at any moment and several times, ends with exactly the rows of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from arena import fill
from mock_judge import running

from tersor.opening.records import Battle
from tersor.opening.store import Store

JUDGE = """
    import sys
    from tersor.opening.judging.endpoint import EndpointJudge
    from tersor.opening.judging.runner import run_judge
    from tersor.opening.prompts import JudgePrompt
    from tersor.opening.store import Store
    with Store.open(sys.argv[1]) as store:
        judge = EndpointJudge(sys.argv[2], "mock", JudgePrompt(side=112), concurrency=16)
        run_judge(store, judge, rep=int(sys.argv[3]))
"""
CONCURRENCY = 16


def start(store: Store, base: str, rep: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(JUDGE), str(store.folder), base, str(rep)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "src")},
        # What a shell starts in the background ignores interrupts, and so would the judge.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def kill_and_go_on(store: Store, battles: int, kills: int) -> None:
    have = store.battles()
    store.add_battles(
        Battle(f"{number:016x}", each.uid, each.task, each.a, each.b)
        for number, each in ((number, have[number % len(have)]) for number in range(battles - len(have)))
    )
    rng = random.Random(7)
    with running(latency=0.005) as server:
        assert start(store, server.base, 1).wait() == 0
        before = server.stats()["requests"]
        for _ in range(kills):
            rows = len(store.raw("endpoint:mock", rep=0))
            wanted = rows + rng.randint(1, 2 * battles // (kills + 1))
            process = start(store, server.base, 0)
            while len(store.raw("endpoint:mock", rep=0)) < wanted and process.poll() is None:
                time.sleep(rng.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert start(store, server.base, 0).wait() == 0
        sent = server.stats()["requests"] - before
    whole, killed = (
        {(row.battle, row.order): (row.label, row.status) for row in store.raw("endpoint:mock", rep=rep)}
        for rep in (1, 0)
    )
    assert len(store.raw("endpoint:mock", rep=0)) == len(killed) == 2 * battles
    assert killed == whole
    assert sent <= 2 * battles + kills * CONCURRENCY
    assert store.read("PRAGMA integrity_check") == [("ok",)]
    print(f"{sent} requests for {2 * battles} rows and {kills} kills")


def test_a_kill_changes_nothing(run) -> None:
    kill_and_go_on(run, 60, 1)


@pytest.mark.slow
def test_five_kills_among_2000_battles_change_nothing(store, mini_root) -> None:
    fill(store, mini_root, ["best", "good", "poor"])
    kill_and_go_on(store, 2000, 5)
    rows = sorted(store.raw("endpoint:mock", rep=1), key=lambda row: row.time)
    early, late = (rows[399].time - rows[0].time, rows[3999].time - rows[3600].time)
    print(f"first 400 rows {early:.2f} s, last 400 rows {late:.2f} s")
    assert late <= 1.3 * early


def test_an_interrupt_ends_at_once_and_keeps_what_was_said(run) -> None:
    with running(latency=1.0) as server:
        process = start(run, server.base, 0)
        while len(run.raw("endpoint:mock")) < 16:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) != 0
    rows = run.raw("endpoint:mock")
    assert 16 <= len(rows) < 40 and {row.status for row in rows} == {"ok"}

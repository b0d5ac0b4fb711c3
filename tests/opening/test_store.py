"""The run's file: what is recorded stays, whoever writes and whatever ends."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from tersor._errors import TersorError
from tersor.opening.records import Battle, Instance, Raw, Step
from tersor.opening.store import FILE, Store

BATTLES = [Battle.of(f"01010{n:02}", "01.01", "x", "y") for n in range(20)]


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "run", create=True) as opened:
        yield opened


def test_everything_comes_back_as_it_was(store, tmp_path) -> None:
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    inputs = (Step("draw", None), Step("this", root / "images" / "1-i-1.jpg"))
    instance = Instance("0101001", "1", "1", "001", "topic", "task", inputs, (Step("", root / "images/1-o-1.jpg"),))
    store.add_instances([instance], root)
    answer = (Step("an answer", store.folder / "x_output" / "0101001-o-0.jpg"), Step("", None))
    store.add_output("x", "0101001", answer, "abc")
    store.add_battles(BATTLES)
    store.add_judge("j", prompt_hash="p", prompt="words", orders="both", settings={"side": 512})
    rows = [Raw(BATTLES[0].id, "j", "p", 0, 0, "ok", "A", 0.25, "A is better", 0.5, 10, 3, 2, 17.0)]
    store.record(rows).result()
    with Store.open(store.folder / FILE) as again:
        assert again.instances() == [instance]
        assert instance.task == "01.01"
        assert again.outputs("x") == {"0101001": answer}
        assert again.hashes("x") == {"0101001": "abc"}
        assert again.battles() == BATTLES
        assert again.raw("j") == rows
        assert again.prompts("j") == {"p": "words"}
        assert again.settings("j", "p") == {"side": 512}


def test_what_is_written_is_on_the_disk_and_readers_do_not_wait(store) -> None:
    found = store.transact(lambda connection: [
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")])  # fmt: skip
    assert found == [2, "wal"]


def test_battles_keep_their_place_and_come_once(store) -> None:
    assert store.add_battles(BATTLES[5:]) == 15
    assert store.add_battles(BATTLES) == 5
    assert store.battles() == [*BATTLES[5:], *BATTLES[:5]]


def test_a_judge_of_both_orders_decides_only_with_both(store) -> None:
    store.add_battles(BATTLES)
    store.add_judge("j", orders="both")
    store.record([Raw(BATTLES[0].id, "j", order=0, label="A"), Raw(BATTLES[0].id, "j", order=1, label="B")]).result()
    store.record(Raw(BATTLES[1].id, "j", order=0, label="A")).result()
    store.record(Raw(BATTLES[1].id, "j", order=1, status="unparsed", text="hm")).result()
    assert [(each.battle, each.label) for each in store.verdicts("j")] == [(BATTLES[0].id, "A")]
    store.add_judge("k")
    store.record(Raw(BATTLES[1].id, "k", order=1, label="A")).result()
    assert [(each.first, each.label) for each in store.verdicts("k")] == [("y", "B")]


def test_people_are_one_judge_together(store) -> None:
    store.add_battles(BATTLES)
    for name, label in (("anna", "A"), ("bo", "A"), ("cy", "B")):
        store.add_judge(f"human:{name}")
        store.record(Raw(BATTLES[0].id, f"human:{name}", label=label)).result()
    assert store.judges() == ["human", "human:anna", "human:bo", "human:cy"]
    assert [each.label for each in store.verdicts("human")] == ["A"]


def test_a_panel_decides_by_majority(store) -> None:
    store.add_battles(BATTLES)
    for name, label in (("j", "A"), ("k", "B"), ("l", "B")):
        store.add_judge(name)
        store.record(Raw(BATTLES[0].id, name, label=label)).result()
    assert [(each.label, each.judge) for each in store.verdicts("panel:j+k+l")] == [("B", "panel:j+k+l")]
    with pytest.raises(TersorError, match="no judge 'm'"):
        store.verdicts("panel:j+m")


def test_two_prompts_are_never_mixed(store) -> None:
    store.add_battles(BATTLES)
    for prompt, label in (("p", "A"), ("q", "B")):
        store.add_judge("j", prompt_hash=prompt)
        store.record(Raw(BATTLES[0].id, "j", prompt, label=label)).result()
    with pytest.raises(TersorError, match="several prompts; choose one of p, q"):
        store.verdicts("j")
    assert [each.label for each in store.verdicts("j", prompt="q")] == ["B"]
    with pytest.raises(TersorError, match="no judge 'gpt'"):
        store.verdicts("gpt")


def test_no_row_pretends_to_be_decided(store) -> None:
    with pytest.raises(TersorError, match="has no label"):
        store.record(Raw(BATTLES[0].id, "j"))


def test_names_that_differ_in_case_alone_are_refused(store) -> None:
    store.add_output("Emu", "u", (), "")
    with pytest.raises(TersorError, match="only in case"):
        store.add_output("emu", "u", (), "")


def test_a_folder_without_a_run_and_a_foreign_file_are_refused(tmp_path) -> None:
    with pytest.raises(TersorError, match="holds no run; make one"):
        Store.open(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / FILE).write_text("not a database " * 100)
    with pytest.raises(TersorError, match="is no run"):
        Store.open(tmp_path)


def test_a_second_process_may_not_do_the_same(store) -> None:
    other = Store.open(store.folder)
    refused = pytest.raises(TersorError, match="another process does judge")
    with store.exclusive("judge"), store.exclusive("other"), refused, other.exclusive("judge"):
        pass
    with other.exclusive("judge"):
        pass
    other.close()


def test_many_threads_write_and_read_at_once(store) -> None:
    store.add_battles(BATTLES)
    store.add_judge("j")

    def work(order: int) -> None:
        for battle in BATTLES:
            store.record(Raw(battle.id, "j", order=order % 2, rep=order // 2, label="A")).result()
            assert any(row.battle == battle.id for row in store.raw("j"))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(store.raw("j")) == 8 * len(BATTLES)
    assert len(store.verdicts("j", rep=3)) == len(BATTLES)


def test_one_bad_job_does_not_take_the_others_with_it(store) -> None:
    store.add_battles(BATTLES)
    gate = threading.Event()
    store.submit(lambda connection: gate.wait(5))
    good = store.record(Raw(BATTLES[0].id, "j", label="A"))
    bad = store.submit(lambda connection: connection.execute("INSERT INTO nothing VALUES (1)"))
    late = store.record(Raw(BATTLES[1].id, "j", label="A"))
    gate.set()
    good.result()
    late.result()
    with pytest.raises(OSError, match="what was recorded before is kept"):
        bad.result()
    assert len(store.raw("j")) == 2


WRITER = """
    import sys
    from tersor.opening.records import Raw
    from tersor.opening.store import Store
    store = Store.open(sys.argv[1])
    number = 0
    while True:
        store.record([Raw(f"{number}", "j", label="A", text="x" * 2000)]).result()
        print(number, flush=True)
        number += 1
"""


@pytest.mark.skipif(os.name != "posix", reason="limits and signals of POSIX")
@pytest.mark.parametrize("end", ["kill", "full disk"])
def test_what_was_said_to_be_recorded_survives(store, end) -> None:
    limit = "ulimit -f 2000; " if end == "full disk" else ""
    command = ["bash", "-c", f'{limit}exec "$0" "$@"', sys.executable, "-c", textwrap.dedent(WRITER), str(store.folder)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
    )  # fmt: skip
    assert process.stdout is not None
    told = 0
    for line in process.stdout:
        told = int(line)
        if end == "kill" and told == 40:
            process.kill()
            break
        assert told < 100_000
    _, said = process.communicate()
    assert end == "kill" or "what was recorded before is kept" in said
    assert len(store.raw("j")) >= told + 1 > 40
    with sqlite3.connect(store.file) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()

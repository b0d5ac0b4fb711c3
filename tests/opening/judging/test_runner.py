"""Runs go on where they stopped, ask nothing twice, and mix nothing."""

from __future__ import annotations

import pytest

from tersor._errors import TersorError
from tersor.opening.judging.base import Reply
from tersor.opening.judging.runner import changed_answers, contestant, run_judge
from tersor.opening.judging.scripted import ScriptedJudge
from tersor.opening.outputs import ANSWERS, model_folder
from tersor.opening.records import Battle
from tersor.opening.store import Store


class Stub(ScriptedJudge):
    """Answers as told, and remembers what it was asked."""

    def __init__(self, reply=lambda question: Reply("ok", "A"), name="stub") -> None:
        super().__init__(lambda *given: 0.0, name=name)
        self.reply, self.asked = reply, []

    def run(self, questions, record) -> None:
        for question in questions:
            self.asked.append(question)
            record(question, self.reply(question))


def test_a_run_that_broke_goes_on_where_it_was(run) -> None:
    class Broken(Stub):
        def run(self, questions, record) -> None:
            for number, question in enumerate(questions):
                if number == 7:
                    raise OSError("gone")
                record(question, Reply("ok", "A"))

    with pytest.raises(OSError, match="gone"):
        run_judge(run, Broken())
    run.close()
    with Store.open(run.folder) as again:
        assert len(again.raw("scripted:stub")) == 7
        judge = Stub()
        outcome = run_judge(again, judge)
        assert len(judge.asked) == 33 and outcome.decided == 20
        rows = [(row.battle, row.order) for row in again.raw("scripted:stub")]
        assert sorted(rows) == sorted((each.id, order) for each in again.battles() for order in (0, 1))


def test_only_errors_are_asked_again(run) -> None:
    statuses = iter(["error", "unparsed", "refused", "too_large"] * 10)
    outcome = run_judge(run, Stub(lambda question: Reply(next(statuses))))
    assert outcome.decided == 0 and outcome.missing == 1.0
    assert outcome.statuses == {"error": 10, "refused": 10, "too_large": 10, "unparsed": 10}
    again = Stub()
    run_judge(run, again)
    assert len(again.asked) == 10


def test_another_prompt_judge_or_repetition_starts_new_rows(run) -> None:
    run_judge(run, Stub(), orders="one")
    for judge, rep in ((Stub(), 1), (Stub(name="other"), 0)):
        run_judge(run, judge, orders="one", rep=rep)
        assert len(judge.asked) == 20
    judge = Stub()
    judge.prompt_hash = "new"
    run_judge(run, judge, orders="one")
    assert len(judge.asked) == 20
    with pytest.raises(TersorError, match="several prompts"):
        run.verdicts("scripted:stub")


def test_both_orders_show_the_same_answers_the_other_way_round(run) -> None:
    judge = Stub()
    run_judge(run, judge)
    one, two = judge.asked[:2]
    assert one.battle == two.battle and (one.order, two.order) == (0, 1)
    assert (one.first, one.second) == (two.second, two.first)
    assert one.first == run.outputs(one.battle.a)[one.battle.uid]


def test_empty_answers_lose_without_being_shown_where_that_is_wanted(run) -> None:
    battle = run.battles()[0]
    run.add_output(battle.a, battle.uid, (), "")
    shown = Stub()
    run_judge(run, shown)
    assert len(shown.asked) == 40
    judge = Stub(name="strict")
    outcome = run_judge(run, judge, empty_loses=True)
    assert len(judge.asked) == 38 and outcome.statuses == {"empty": 2, "ok": 38}
    assert next(each for each in run.verdicts("scripted:strict") if each.battle == battle.id).label == "B"


def test_battles_without_an_answer_are_skipped_or_lost(run) -> None:
    run.add_battles([Battle.of(run.battles()[0].uid, "01.01", "best", "nobody")])
    assert run_judge(run, Stub()).skipped == 1
    run.set("missing_loses", True)
    outcome = run_judge(run, Stub())
    assert (outcome.skipped, outcome.asked, outcome.statuses["empty"]) == (0, 2, 2)
    assert run.verdicts("scripted:stub")[-1].label == "A"


def test_battles_on_instances_that_the_run_lacks_are_skipped(run) -> None:
    run.add_battles([Battle.of("9999999", "99.99", "best", "good")])
    for missing_loses in (False, True):
        run.set("missing_loses", missing_loses)
        assert run_judge(run, Stub()).skipped == 1


def test_a_judge_of_both_orders_is_not_asked_in_one(run) -> None:
    run_judge(run, Stub(), orders="one")
    assert len(run_judge(run, Stub()).statuses) == 1 and len(run.raw("scripted:stub")) == 40
    with pytest.raises(TersorError, match="go on with --orders both"):
        run_judge(run, Stub(), orders="one")


def test_an_answer_with_verdicts_on_it_is_not_replaced_unasked(run) -> None:
    run_judge(run, Stub())
    battle = run.battles()[0]
    with pytest.raises(TersorError, match=f"first {battle.a} {battle.uid}; take them"):
        run.add_output(battle.a, battle.uid, (), "other")
    run.add_output(battle.a, battle.uid, run.outputs(battle.a)[battle.uid], run.hashes(battle.a)[battle.uid])
    run.forget([battle.id])
    run.add_output(battle.a, battle.uid, (), "other")


def test_two_judges_at_once_are_refused_and_so_is_a_run_without_battles(run, tmp_path) -> None:
    with run.exclusive("judge"), Store.open(run.folder) as other, pytest.raises(TersorError, match="another process"):
        run_judge(other, Stub())
    with Store.open(tmp_path / "empty", create=True) as empty, pytest.raises(TersorError, match="has no battles"):
        run_judge(empty, Stub())


def test_changed_answers_are_found(run) -> None:
    assert changed_answers(run) == []
    uid = run.instances()[0].uid
    folder = model_folder(run.folder / ANSWERS, "good")
    (folder / f"{uid}.json").write_text((folder / f"{uid}.json").read_text() + " ")
    (folder / f"{run.instances()[1].uid}-o-0.jpg").unlink()
    assert changed_answers(run) == [("good", uid), ("good", run.instances()[1].uid)]


def test_progress_counts_what_is_on_the_disk(run) -> None:
    seen = []
    run_judge(run, Stub(), on_progress=lambda done, of: seen.append((done, of, len(run.raw("scripted:stub")))))
    assert seen[-1] == (40, 40, 40)
    assert all(done <= rows for done, _, rows in seen)


@pytest.mark.parametrize(
    ("judge", "found"),
    [("endpoint:gpt-4o", "GPT-4o+DALL-E3"), ("hf:BAAI/Emu2", "Emu2"), ("endpoint:qwen", None), ("scripted:ab", None)],
)
def test_a_judge_that_is_a_contestant_is_noticed(judge, found) -> None:
    stub = Stub()
    stub.id = judge
    assert contestant(stub.id, ["Emu2", "GPT-4o+DALL-E3"]) == found

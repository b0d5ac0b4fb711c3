"""Reference-augmented generation: who wins, what is shown, and what makes no pair."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersor._errors import TersorError
from tersor.opening.data import read_data
from tersor.opening.generators.loop import StepLoop
from tersor.opening.generators.scripted import LADDER, GoldGenerator
from tersor.opening.intjudge.references import JUDGE, LEFT, TOLD, referenced, write_references
from tersor.opening.scenes import faults
from tersor.opening.store import Store


@pytest.fixture
def run(store: Store, mini_root: Path) -> Store:
    store.add_instances(read_data(mini_root).instances, mini_root)
    return store


def test_the_answer_with_the_reference_wins_and_has_fewer_faults(run: Store) -> None:
    weak = LADDER[2]
    count = write_references(run, weak)
    verdicts = run.verdicts(JUDGE)
    assert count == len(verdicts) > 40
    assert {(each.a, each.label) for each in verdicts} == {("weak+reference", "A")}
    asked = {each.uid: each for each in run.instances()}
    plain, better = run.outputs("weak"), run.outputs("weak+reference")
    wrong = [sum(faults(asked[uid], own[uid]) for uid in asked) for own in (plain, better)]
    assert wrong[1] < 0.5 * wrong[0]
    assert write_references(run, weak) == count and len(run.raw(JUDGE)) == count  # again: nothing is added


def test_equal_answers_make_no_pair(run: Store) -> None:
    strong = LADDER[0]
    count = write_references(run, strong)
    same = run.hashes("strong"), run.hashes("strong+reference")
    assert count == sum(same[0][uid] != same[1][uid] for uid in same[0]) < 46


def test_a_model_is_shown_the_gold_answer_behind_the_request(run: Store) -> None:
    seen: list[list[str]] = []

    def make_step(given, made, seed):
        seen.append([text for text, _ in given])
        return f"{len(given)} given", None

    instance = run.instances()[0]
    loop = referenced(StepLoop(make_step, name="mine"))
    answer = loop.generate(instance, n_steps=1, seed=0)
    assert loop.name == "mine+reference" and loop.family == "end_to_end"
    asked, gold = [each.text for each in instance.inputs], [each.text for each in instance.gold]
    assert seen == [[*asked, TOLD, *gold]]
    assert answer.steps[0][0] == f"{len(asked) + 1 + len(gold)} given"


def test_a_scripted_generator_errs_at_a_part_of_its_rates() -> None:
    better = referenced(LADDER[1])
    assert better.p_wrong_colour == pytest.approx(LEFT * LADDER[1].p_wrong_colour)
    assert better.p_missing_step == pytest.approx(LEFT * LADDER[1].p_missing_step)
    assert better.verbosity == LADDER[1].verbosity


def test_the_gold_answer_is_no_generator_for_references(run: Store) -> None:
    with pytest.raises(TersorError, match="gold answer cannot be made better"):
        write_references(run, GoldGenerator())

"""Ways to train tiny-vlm: the same questions and thresholds for each, and what differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tersor import zoo
from tersor.rl.bench import arms
from tersor.rl.bench.arms import ARMS, SETTINGS, SUPERVISED, Plan, Setting, as_questions, supervise
from tersor.rl.data import prompt_inputs, with_pictures
from tersor.rl.policy import load_policy

PLAN = Plan(steps=2, questions=1, thresholds=(0.5, 0.975), grid=8, pictures=6)
MODEL = zoo.path("tiny-vlm")


def test_each_way_differs_from_the_plan_in_what_it_is_named_for(tmp_path: Path) -> None:
    plain = PLAN.config(tmp_path, 3, (0,))
    assert (plain.objective, plain.efficiency_weight, plain.gate, plain.beta) == ("pathwise", 0.25, "group_any", 0.1)
    assert plain.recipe().skip_layers == (0,) and plain.seed == 3 and plain.thresholds == [0.5, 0.975]
    for arm, changes in ARMS.items():
        found = PLAN.config(tmp_path, 3, (0,), **changes)
        different = {
            name
            for name in ("objective", "efficiency_weight", "gate", "beta")
            if getattr(found, name) != getattr(plain, name)
        }
        assert different == set(changes), arm


def test_questions_are_as_many_of_each_kind_and_other_seeds_are_others() -> None:
    found = PLAN.data(0)
    kinds = [row[0]["content"].split()[0] for row in found["prompt"]]
    assert kinds == ["look"] * 2 + ["chain"] * 2 + ["trail"] * 2
    assert PLAN.data(1)["prompt"][:] != found["prompt"][:]


def test_a_check_takes_any_word_on_the_way_and_gives_no_answer_to_learn_from() -> None:
    found = PLAN.data(0, checked=True)
    assert [len(set(row["answer"])) for row in found] == [1, 1, 2, 2, 3, 3]
    assert all(plain["answer"][0] == row["answer"][-1] for plain, row in zip(PLAN.data(0), found, strict=True))
    checked = [name for name, setting in SETTINGS.items() if setting.checked]
    assert checked and all(not SETTINGS[name].allows("given answers + ratio") for name in checked)
    assert all(SETTINGS[name].allows(arm) for name in checked for arm in ("pathwise", "ratio alone"))


@pytest.mark.parametrize("answers", SUPERVISED.values())
def test_supervised_training_moves_the_weights_without_a_reward(answers: str) -> None:
    model, processor = load_policy(str(MODEL)), zoo.load_processor("tiny-vlm")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    log = supervise(model, processor, as_questions(2, seed=1, grid=8), PLAN, answers, seed=0, skip_layers=())
    assert [sorted(row) for row in log] == [["loss", "token_ratio"]] * 2
    assert 0 < log[0]["token_ratio"] < 1
    alone = PLAN.efficiency_weight * log[0]["token_ratio"]
    assert (log[0]["loss"] == pytest.approx(alone)) is (answers == "none")
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    # What leads to no token's choice has no gradient from the ratio alone.
    assert changed < trained if answers == "none" else changed == trained


@pytest.mark.parametrize("answers", ["given", "own"])
def test_supervised_targets_are_the_answers_where_the_question_ends(answers: str) -> None:
    """The dense model answers right, so that both targets name the same word."""
    teacher, processor = load_policy(str(MODEL)).eval(), zoo.load_processor("tiny-vlm")
    rows = [as_questions(3, seed=1, grid=8)[index] for index in range(3)]
    inputs = prompt_inputs(processor, [with_pictures(row) for row in rows])
    found = arms._targets(answers, teacher, processor, rows, inputs)
    named = found if found.ndim == 1 else found.argmax(-1)
    assert processor.tokenizer.convert_ids_to_tokens(named.tolist()) == [row["answer"][0] for row in rows]


@pytest.mark.parametrize("arm", ["pathwise", "ratio alone"])
def test_a_way_is_trained_from_the_same_start(arm: str) -> None:
    plan = Plan(steps=1, questions=1, thresholds=(0.5, 0.975), grid=8, pictures=3)
    model, log = arms.train_arm(arm, MODEL, zoo.load_processor("tiny-vlm"), plan, seed=0, setting=Setting())
    assert not model.training and len(log) == 1
    assert model.config.text_config._attn_implementation == "sdpa"

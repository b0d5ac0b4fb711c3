"""Ways to train tiny-vlm: the same questions and thresholds for each, and what differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tersor import zoo
from tersor.rl.bench import arms
from tersor.rl.bench.arms import ARMS, IMITATION, Plan, as_questions, imitate
from tersor.rl.policy import load_policy

PLAN = Plan(steps=2, questions=1, thresholds=(0.5, 0.975), grid=8, pictures=6)
MODEL = zoo.path("tiny-vlm")


def test_each_way_differs_from_the_plan_in_what_it_is_named_for(tmp_path: Path) -> None:
    plain = PLAN.config(tmp_path, 3, (0,))
    assert (plain.objective, plain.efficiency_weight, plain.gate, plain.beta) == ("pathwise", 1.0, "group_any", 0.1)
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


def test_imitation_moves_ratio_and_weights_without_a_reward() -> None:
    model, processor = load_policy(str(MODEL)), zoo.load_processor("tiny-vlm")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    log = imitate(model, processor, as_questions(2, seed=1, grid=8), PLAN, seed=0, skip_layers=())
    assert [sorted(row) for row in log] == [["loss", "token_ratio"]] * 2
    assert 0 < log[0]["token_ratio"] < 1
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_imitation_reads_the_answer_where_the_question_ends() -> None:
    """The model is right already, so that its loss on the answer alone is small, and large on any other token."""
    model, processor = load_policy(str(MODEL)).eval(), zoo.load_processor("tiny-vlm")
    rows = [as_questions(3, seed=1, grid=8)[index] for index in range(3)]
    inputs, answers = arms._with_answers(processor, rows)
    with torch.no_grad():
        said = model(**inputs, use_cache=False, logits_to_keep=2).logits[:, 0].argmax(-1)
    assert torch.equal(said, answers)


@pytest.mark.parametrize("arm", ["pathwise", IMITATION])
def test_a_way_is_trained_from_the_same_start(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "imitate", lambda *args, **options: [{"token_ratio": 0.5}])
    plan = Plan(steps=1, questions=1, thresholds=(0.5, 0.975), grid=8, pictures=3)
    model, log = arms.train_arm(arm, MODEL, zoo.load_processor("tiny-vlm"), plan, seed=0, skip_layers=())
    assert not model.training and len(log) == 1
    assert model.config.text_config._attn_implementation == "sdpa"

"""Scripted generators have the faults that they are set to have, and a known order."""

from __future__ import annotations

import itertools

import pytest

from tersor._errors import TersorError
from tersor.opening.data import read_data
from tersor.opening.generators.base import generate_all
from tersor.opening.generators.scripted import LADDER, GoldGenerator, ScriptedGenerator
from tersor.opening.generators.specs import generator_of
from tersor.opening.records import Instance, Step
from tersor.opening.scenes import faults


@pytest.fixture
def instances(mini_root):
    return read_data(mini_root).instances


def mean_faults(store, instances, generator) -> float:
    generate_all(store, generator)
    answers = store.outputs(generator.name)
    return sum(faults(each, answers[each.uid]) for each in instances) / len(instances)


@pytest.fixture
def filled(store, instances, mini_root):
    store.add_instances(instances, mini_root)
    return store


def test_the_ladder_has_the_order_that_it_promises(filled, instances) -> None:
    found = [mean_faults(filled, instances, each) for each in (GoldGenerator(), *LADDER)]
    assert found == sorted(found) and found[0] == 0 and found[1] > 0
    assert all(two > one + 0.1 for one, two in itertools.pairwise(found))


DIALS = [
    {}, {"p_wrong_colour": 1.0}, {"p_missing_step": 1.0}, {"p_missing_image": 1.0}, {"noise": 40.0}, {"verbosity": 2},
]  # fmt: skip


@pytest.mark.parametrize("dial", DIALS, ids=str)
def test_each_dial_turns_what_it_says(instances, dial) -> None:
    instance = next(each for each in instances if len(each.gold) == 3)
    steps = ScriptedGenerator(name="x", **dial).generate(instance, n_steps=3, seed=1).steps
    assert len(steps) == (1 if "p_missing_step" in dial else 3)
    assert all((picture is None) == ("p_missing_image" in dial) for _, picture in steps)
    assert all(("nice picture" in text) == ("verbosity" in dial) for text, _ in steps)
    if "p_wrong_colour" in dial or "noise" in dial:
        plain = ScriptedGenerator(name="x").generate(instance, n_steps=3, seed=1).steps
        assert all(one[1].tobytes() != two[1].tobytes() for one, two in zip(steps, plain, strict=True))


def test_the_same_seed_makes_the_same_answer(instances) -> None:
    weak, one = LADDER[-1], instances[0]
    made = [[text for text, _ in weak.generate(one, n_steps=None, seed=seed).steps] for seed in (1, 1, 2, 3, 4, 5)]
    assert made[0] == made[1]
    pictures = [weak.generate(one, n_steps=None, seed=1).steps for _ in range(2)]
    assert [each and each.tobytes() for _, each in pictures[0]] == [each and each.tobytes() for _, each in pictures[1]]


def test_instances_of_another_kind_and_bad_rates_are_refused() -> None:
    foreign = Instance("0101001", "1", "1", "1", "", "", (Step("x"),), (Step("A photo of a cat."),))
    with pytest.raises(TersorError, match="not about scenes"):
        LADDER[0].generate(foreign, n_steps=1, seed=0)
    for dial in ({"p_wrong_colour": 1.5}, {"noise": -1.0}, {"verbosity": -1}):
        with pytest.raises(TersorError):
            ScriptedGenerator(name="x", **dial)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("magic", "must be gold"), ("scripted:best", "must be gold"), ("chat:x", "needs --images"),
        ("images:magic", "image backend"), ("loop:nothing", "must name a function"),
        ("images:endpoint:x", "--base-url"),
    ],
)  # fmt: skip
def test_unknown_generators_are_refused(text, said) -> None:
    with pytest.raises(TersorError, match=said):
        generator_of(text)

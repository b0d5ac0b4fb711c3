from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tersor import zoo
from tersor.opening.bench.images import (
    BASELINE,
    MODEL,
    DigitJudge,
    comparisons,
    contestants,
    digit_of,
    draw,
    instances,
    judged,
    names_of,
)  # fmt: skip
from tersor.opening.records import Instance, Step
from tersor.opening.store import Store


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with Store.open(folder, create=True) as store:
        contestants(store, (1,), 20, seed=5)
        judged(store)
    return folder


def test_every_prompt_is_answered_by_all_and_every_window_meets_the_baseline(run: Path) -> None:
    with Store.open(run) as store:
        asked = store.instances()
        assert [digit_of(each) for each in instances(20)] == [*range(10)] * 2
        assert sorted(each.task for each in asked) == sorted(f"01.{digit + 1:02}" for digit in [*range(10)] * 2)
        assert all(f"digit {digit_of(each)}." in each.inputs[0].text for each in asked)
        assert sorted(store.models()) == sorted(names_of((1,)))
        assert all(len(store.outputs(model)) == 20 for model in store.models())
        assert len(store.battles()) == 20 and all(BASELINE in each.pair for each in store.battles())


def test_the_classifier_decides_both_orders_alike_and_knows_the_worse_decoding(run: Path) -> None:
    with Store.open(run) as store:
        verdicts = store.verdicts("scripted:digits")
        assert len(verdicts) == 20 and all(each.consistent for each in verdicts)
        (small,) = comparisons(store, "scripted:digits", (1,), (0.05,))
        assert small.score is not None and small.score < 0.45 and small.tally.battles == 20


def test_a_verdict_is_whether_the_classifier_sees_the_digit(tmp_path: Path) -> None:
    judge, asked = DigitJudge(), instances(2)
    chances = {"sure": (0.9, 0.1), "unsure": (0.6, 0.4), "wrong": (0.2, 0.8), "worse": (0.1, 0.9)}
    answers = {name: [Step("", tmp_path / name)] for name in chances}
    judge.seen = {tmp_path / name: torch.tensor(each) for name, each in chances.items()}

    def says(one: str, other: str, instance: Instance = asked[0]) -> float:
        return judge(instance, answers[one], answers[other])

    assert (says("unsure", "wrong"), says("wrong", "unsure")) == (2, -2)
    assert (says("sure", "unsure"), says("worse", "wrong"), says("sure", "sure")) == (1, -1, 0)
    assert says("unsure", "wrong", asked[1]) == -2, "of the other digit"


def test_images_follow_from_the_seed() -> None:
    model, labels = zoo.load_model(MODEL), torch.tensor([3, 4])
    one, again, other = (draw(model, labels, 2, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert draw(model, labels, None, 1).shape == one.shape == (2, *model.config.grid_size)

"""The model that a training moves, and what of it."""

from __future__ import annotations

import torch

from tersor import zoo
from tersor.rl.policy import load_policy

MODEL = zoo.path("tiny-vlm")


def test_the_vision_tower_is_not_trained() -> None:
    trained = {name for name, weight in load_policy(str(MODEL)).named_parameters() if weight.requires_grad}
    assert trained and not any("visual" in name for name in trained)


def test_all_weights_are_trained_where_that_is_asked_for_in_the_wanted_precision() -> None:
    policy = load_policy(str(MODEL), train_vision=True, dtype=torch.bfloat16)
    assert all(weight.requires_grad and weight.dtype == torch.bfloat16 for weight in policy.parameters())

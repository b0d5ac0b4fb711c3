"""Rewards and advantages, by hand-made groups and against trl's formula."""

from __future__ import annotations

import math

import pytest
import torch

from tersor.rl.rewards import group_advantages, zipr1_rewards

NAN = math.nan


def table(performance, ratios, **settings):
    return zipr1_rewards(torch.tensor(performance), torch.tensor(ratios, dtype=torch.float64), 4, **settings)


def test_the_rewards_of_hand_made_groups() -> None:
    """All wrong, one right, mixed, all right: Eq. (9)."""
    found = table(
        [0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0, 1, 1, 1, 1],
        [0.5, 0.6, 0.7, 0.8] * 4,
    )
    assert found.gate.tolist() == [0.0] * 4 + [1.0] * 12
    saved = [0.5, 0.4, 0.3, 0.2]
    expected = [0.0] * 4 + [0.5, 0.4, 1.3, 0.2] + [1.5, 0.4, 1.3, 0.2] + [1 + each for each in saved]
    assert found.total.tolist() == pytest.approx(expected)
    assert found.efficiency.tolist() == pytest.approx([0.0] * 4 + saved * 3)


def test_a_right_answer_beats_every_wrong_one_of_its_group() -> None:
    generator = torch.Generator().manual_seed(0)
    right = (torch.rand(400, generator=generator) > 0.5).double()
    total = zipr1_rewards(right, torch.rand(400, generator=generator) * 0.999 + 0.001, 8).total.reshape(-1, 8)
    for scores, rewards in zip(right.reshape(-1, 8), total, strict=True):
        if 0 < scores.sum() < 8:
            assert rewards[scores == 1].min() > rewards[scores == 0].max()


def test_without_the_gate_saving_is_rewarded_where_nobody_is_right() -> None:
    assert table([0, 0, 0, 0], [0.5, 0.6, 0.7, 0.8], gate="none").total.tolist() == pytest.approx([0.5, 0.4, 0.3, 0.2])


def test_what_cannot_be_scored_opens_no_gate_and_gets_nothing() -> None:
    found = table([NAN, 0, NAN, 0, NAN, 1, 0, 0], [0.5] * 8)
    assert found.gate.tolist() == [0.0] * 4 + [1.0] * 4
    assert [math.isnan(each) for each in found.total.tolist()] == [True, False, True, False, True, False, False, False]
    assert found.total[5] == pytest.approx(1.5)


def test_advantages_are_those_of_the_formula() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    found = group_advantages(rewards, 4)
    centred = rewards[:4] - 3.0
    assert found[:4].tolist() == pytest.approx((centred / (rewards[:4].std() + 1e-4)).tolist())
    assert found[4:].tolist() == [0.0] * 4
    assert group_advantages(rewards, 4, scale=False)[:4].tolist() == pytest.approx(centred.tolist())


def test_advantages_leave_out_what_has_no_reward() -> None:
    found = group_advantages(torch.tensor([1.0, NAN, 3.0, NAN, 7.0, NAN, NAN, NAN]), 4)
    assert found.tolist() == pytest.approx([-(2**-0.5), 0.0, 2**-0.5, 0.0, 0.0, 0.0, 0.0, 0.0], abs=1e-3)


def test_rollouts_must_be_whole_groups() -> None:
    for call in (lambda: group_advantages(torch.zeros(6), 4), lambda: zipr1_rewards(torch.zeros(6), torch.ones(6), 4)):
        with pytest.raises(ValueError, match="no whole groups of 4"):
            call()


def weights(p: float, efficiency_weight: float, *, scale: bool = True, gate: str = "group_any") -> list[float]:
    """The expected weight on the gradient of the log-odds of a right answer, by threshold from low to high.

    With one-token answers the gradient of rollout ``n`` is ``A_n (c_n - p_n)`` times that of its log-odds.
    """
    ratios = torch.tensor([0.780, 0.791, 0.804, 0.814, 0.826, 0.839, 0.853, 0.868], dtype=torch.float64)
    groups = 200_000
    right = (torch.rand(groups, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) < p).double()
    total = zipr1_rewards(
        right.reshape(-1), ratios.repeat(groups), 8, efficiency_weight=efficiency_weight, gate=gate
    ).total
    advantages = group_advantages(total, 8, scale=scale).reshape(groups, 8)
    return ((advantages * (right - p)).mean(0) / (p * (1 - p))).tolist()


def test_the_ratio_in_the_reward_has_no_gradient_without_scaling() -> None:
    """``E[r_eff grad log pi] = r_eff grad 1 = 0``: the ratio only adds variance."""
    alone = weights(0.9, 0.0, scale=False, gate="none")
    assert weights(0.9, 1.0, scale=False, gate="none") == pytest.approx(alone, abs=0.02)
    assert alone == pytest.approx([0.875] * 8, abs=0.02)


def test_with_scaling_the_ratio_weights_low_thresholds_up_and_nothing_else() -> None:
    assert weights(0.9, 0.0) == pytest.approx([2.18] * 8, abs=0.05)
    found = weights(0.9, 1.0)
    assert found == pytest.approx([2.85, 2.66, 2.46, 2.29, 2.09, 1.89, 1.67, 1.41], abs=0.05)
    assert min(weights(0.99, 1.0)) > 0.9  # even the densest right answer is pushed up on average

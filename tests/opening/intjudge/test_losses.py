"""The losses of a judge, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tersor.opening.intjudge.losses import SIGNS, margin, ranking_loss, swap_loss


def test_the_margin_is_the_log_odds_of_the_two_wins_where_the_verdict_begins() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    s = margin(logits, torch.tensor([0, 2]), (1, 4))
    for row, place in ((0, 0), (1, 2)):
        p = logits[row, place].softmax(-1)
        assert s[row].item() == pytest.approx(math.log(p[1] / p[4]), abs=1e-5)


def test_the_ranking_loss_is_the_negative_log_probability_of_the_winner() -> None:
    s, sign, weight = torch.tensor([2.0, 2.0, -1.0]), torch.tensor([1.0, -1.0, 1.0]), torch.tensor([1.0, 1.0, 0.5])
    by_hand = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(2)), 0.5 * math.log(1 + math.exp(1))]
    assert ranking_loss(s, sign, weight).item() == pytest.approx(sum(by_hand) / 3, abs=1e-6)


def test_the_swap_loss_is_zero_for_a_judge_without_a_liking_for_a_place() -> None:
    assert swap_loss(torch.tensor([1.5, -1.5, -3.0, 3.0])).item() == 0.0
    assert swap_loss(torch.tensor([1.5, 0.5, 1.0, 1.0])).item() == pytest.approx((4 + 4) / 2)


def test_a_lean_counts_half_and_signs_turn_with_the_order() -> None:
    assert SIGNS == {"A": (1.0, 1.0), "B": (-1.0, 1.0), "Tie(A)": (1.0, 0.5), "Tie(B)": (-1.0, 0.5)}

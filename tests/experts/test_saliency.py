"""Scores of channels, by formula and by hand."""

from __future__ import annotations

import pytest
import torch
from tuned_models import noise

from tersor.experts.quantizer import Grid, initial_step
from tersor.experts.saliency import channel_scores, most_salient, reconstruction_error


def test_the_factorised_error_is_the_triple_sum() -> None:
    delta, x = noise(6, 9), noise(11, 9, seed=1)
    rounded = Grid(2, False).rounded(delta, initial_step(delta, Grid(2, False), "mse"))
    found = reconstruction_error(delta, rounded, x.square().sum(0))
    for channel in range(9):
        total = 0.0
        for token in range(11):
            for output in range(6):
                difference = float(delta[output, channel]) - float(rounded[output, channel])
                total += (float(x[token, channel]) * difference) ** 2
        assert float(found[channel]) == pytest.approx(total, rel=1e-6)


def test_scores_and_ties() -> None:
    delta, energy = noise(6, 9), torch.arange(9.0)
    rounded = torch.zeros_like(delta)
    scores = {
        name: channel_scores(name, delta, rounded, energy, name="a")
        for name in ("reconstruction", "magnitude", "weight_error", "activation", "wanda", "random")
    }
    assert torch.equal(scores["weight_error"], scores["magnitude"])
    assert torch.equal(scores["activation"], energy.double())
    assert torch.allclose(scores["wanda"], energy.double().sqrt() * delta.double().abs().sum(0))
    assert torch.equal(scores["random"], channel_scores("random", delta, rounded, energy, name="a"))
    assert not torch.equal(scores["random"], channel_scores("random", delta, rounded, energy, name="b"))
    assert scores["reconstruction"][0] == 0
    tied = torch.tensor([0.0, 2.0, 5.0, 2.0, 2.0, 0.0])
    assert most_salient(tied, 2).tolist() == [1, 2]
    assert most_salient(tied, 5).tolist() == [1, 2, 3, 4], "a channel of score 0 is never salient"
    assert most_salient(tied, 6).tolist() == [0, 1, 2, 3, 4, 5], "unless all are wanted"

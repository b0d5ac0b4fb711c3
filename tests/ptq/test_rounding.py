"""Weights that learn to be rounded up or down."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tersor.ptq.quantizers import (
    cut_weight,
)
from tersor.ptq.rounding import LearnedRounding, undecided


def test_rounding_is_learned_up_and_down() -> None:
    """Soft in a training step, an integer otherwise, and what is undecided costs more the later it is."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 4)
    one = torch.tensor(1.0)
    layer = LearnedRounding(
        linear, weight_bits=4, activation_bits=8, w_scale=cut_weight(linear.weight, 4, share=1.0), a_scale=one,
        a_zero=one * 0,
    )  # fmt: skip
    layer.start()
    scaled = linear.weight / layer.w_scale[:, None]
    assert torch.equal(layer.integers(), scaled.round())
    layer.soft = True
    torch.testing.assert_close(layer.integers(), scaled)
    early, late, none = (undecided([layer], progress).item() for progress in (0.3, 1.0, 0.1))
    assert none == 0 and early > late > 0
    layer.soft = False
    with torch.no_grad():
        layer.up.fill_(-5.0)
    assert torch.equal(layer.integers(), scaled.floor().clamp(-7, 7))
    assert undecided([layer], 1.0).item() == pytest.approx(0, abs=1e-3)

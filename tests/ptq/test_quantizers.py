"""Scales: ranges, searches, and the gradient through rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor.ptq.layers import operate
from tersor.ptq.quantizers import (
    cut_activation,
    cut_weight,
    fake_activation,
    fake_weight,
    quantize_activation,
    quantize_weight,
    round_ste,
    search_activation,
    search_weight,
    search_weight_by_output,
)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_stay_in_range_and_zero_is_exact(bits) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1000) + 1, torch.randn(4, 30)
    scale, zero = search_activation(x, bits)
    ints = quantize_activation(x, scale, zero, bits)
    assert torch.equal(ints, ints.round()) and ints.min() >= 0 and ints.max() <= 2**bits - 1
    assert zero == zero.round() and fake_activation(torch.zeros(1), scale, zero, bits) == 0
    assert search_activation(x.relu(), bits)[1] == 0
    ints = quantize_weight(weight, search_weight(weight, bits), bits)
    assert torch.equal(ints, ints.round()) and ints.abs().max() <= 2 ** (bits - 1) - 1
    whole = cut_weight(weight, bits, share=1.0)
    assert torch.equal(quantize_weight(weight, whole, bits).abs().amax(1), torch.full((4,), 2.0 ** (bits - 1) - 1))


def test_a_tensor_of_zeros_has_a_scale() -> None:
    scale, zero = search_activation(torch.zeros(10), 8)
    assert scale > 0 and zero == 0
    assert (search_weight(torch.zeros(2, 3), 4) > 0).all()


def test_squares_keep_outliers_and_absolute_errors_do_not() -> None:
    """Why RepAPQ trains with absolute errors, and why no range may be searched with them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(65_536, generator=generator).abs(), torch.linspace(30, 64, 16)])
    whole = x.max() / 255
    assert search_activation(x, 8, norm=2.0)[0] >= 0.9 * whole
    assert search_activation(x, 8, norm=1.0)[0] <= 0.25 * whole


def test_what_reaches_the_output_finds_the_grid_that_the_weights_hide() -> None:
    """One huge entry in a row, at an input that is nearly always zero."""
    torch.manual_seed(0)
    weight, x = 0.1 * torch.randn(4, 32), torch.randn(256, 32).relu()
    weight[:, 0], x[:, 0] = 60.0, 0.0
    layer = nn.Linear(32, 4, bias=False)
    exact = F.linear(x, weight)

    def error(scale: torch.Tensor) -> float:
        return float((F.linear(x, fake_weight(weight, scale, 8)) - exact).abs().mean() / exact.abs().mean())

    by_output = search_weight_by_output(weight, 8, lambda each: operate(layer, x, each))
    assert error(by_output) < 0.05
    assert error(search_weight(weight, 8)) > 0.5
    assert error(cut_weight(weight, 8, share=1.0)) > 0.5


def test_rows_that_end_at_the_last_ratio_go_on() -> None:
    torch.manual_seed(0)
    weight, x = 0.02 * torch.randn(1, 8), torch.randn(64, 8)
    weight[0, 0], x[:, 0] = 100.0, 0.0
    layer = nn.Linear(8, 1, bias=False)
    scale = search_weight_by_output(weight, 4, lambda each: operate(layer, x, each))
    assert float(scale) < 1e-3 * 100.0 / 7


def test_rounding_passes_the_gradient() -> None:
    x = torch.tensor([0.4, 1.5, -2.5], requires_grad=True)
    rounded = round_ste(x)
    assert rounded.tolist() == [0.0, 2.0, -2.0]
    rounded.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0]


def test_percentiles_cut_off_the_ends() -> None:
    x = torch.cat([torch.linspace(-1, 1, 2001), torch.tensor([50.0])])
    scale, zero = cut_activation(x, 8, share=0.99)
    assert scale == pytest.approx(1.98 / 255, rel=0.02) and abs(zero - 127.5) <= 2
    whole, _ = cut_activation(x, 8, share=1.0)
    assert whole == pytest.approx(51 / 255)
    weight = torch.cat([torch.ones(1, 99), torch.tensor([[70.0]])], 1)
    assert cut_weight(weight, 4, share=0.99) == pytest.approx(1 / 7) and cut_weight(weight, 4, share=1.0) == 10

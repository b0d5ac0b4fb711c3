"""Quantizers and layers: ranges, searches, gradients, and the fold of the affine into integers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rep_models import LAYERS, quantized, within_limits
from torch import nn

from tersor.ptq import quantizers
from tersor.ptq.layers import QuantLayer
from tersor.ptq.quantizers import (
    cut_weight,
    quantize_activation,
    quantize_weight,
)


@pytest.mark.parametrize("kind", LAYERS)
def test_folding_changes_nothing(kind) -> None:
    layer, x = quantized(kind)
    with torch.no_grad():
        layer.gamma.copy_(torch.randn_like(layer.gamma))
        layer.gamma[0], layer.gamma[1] = 0.0, -2.0
        layer.w_scale[2] *= -1  # its absolute value counts
        layer.beta.copy_(torch.randn_like(layer.beta))
        frozen = layer.freeze()
        # The bias goes to the grid of the products, which is the only approximation.
        grid = (frozen.a_scale * frozen.w_scale).max()
        difference = (frozen(x) - layer(x)).abs().max()
    assert difference <= 0.5 * grid + 1e-5 * layer(x).abs().max()
    assert within_limits(frozen)
    ints = quantize_weight(layer.weight, layer.w_scale.abs(), 4)
    assert torch.equal(frozen.weight[1:].abs().float(), ints[1:].abs())
    assert (frozen.weight[0] == 0).all()


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_integers_are_summed_exactly(kind) -> None:
    layer, x = quantized(kind, bits=8)
    frozen = layer.freeze()
    ints = (quantize_activation(x, layer.a_scale, layer.a_zero, 8) - layer.a_zero).to(torch.int64)
    if kind == "linear":
        sums = ints @ frozen.weight.long().T + frozen.bias.long()
        scales = frozen.a_scale * frozen.w_scale
    else:
        columns = F.unfold(ints.double(), 3, padding=1).long()
        sums = (frozen.weight.long().flatten(1) @ columns + frozen.bias.long()[:, None]).view(5, 8, 9, 8)
        scales = (frozen.a_scale * frozen.w_scale)[:, None, None]
    assert int(sums.abs().max()) <= frozen.largest_sum()
    assert torch.equal(frozen(x), (sums.double() * scales.double()).float()) or torch.equal(
        frozen(x), sums.float() * scales
    )


def test_sums_beyond_float32_are_still_exact() -> None:
    layer = nn.Linear(4096, 1)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    one = torch.tensor(1.0)
    frozen = QuantLayer(
        layer, weight_bits=8, activation_bits=8, w_scale=torch.tensor([1 / 127]), a_scale=one, a_zero=one * 0
    ).freeze()
    x = torch.full((1, 4096), 255.0)
    x[0, 0] = 254.0
    assert frozen.largest_sum() > 2**24
    sums = int(frozen.weight.long().sum()) * 255 - 127 + int(frozen.bias)
    assert float(frozen(x)) == pytest.approx(sums * float(frozen.w_scale), rel=1e-7)


def test_gradients_are_those_of_the_expression_without_rounding(monkeypatch) -> None:
    layer, x = quantized("conv")
    layer, x = layer.double(), x.double()
    monkeypatch.setattr(quantizers, "round_ste", lambda value: value)
    # In the middle of the ranges, where the clamps have a gradient.
    x = x[:1, :, :4, :4] * 0.3
    names = ("gamma", "beta", "w_scale", "a_scale")
    values = [getattr(layer, name).detach().clone().requires_grad_() for name in names]

    def forward(*given):
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, values, eps=1e-7, atol=1e-4)


def test_dropping_leaves_some_inputs_unrounded() -> None:
    layer, x = quantized("linear", bits=2)
    layer.weight_bits = 16
    with torch.no_grad():
        layer.w_scale.copy_(cut_weight(layer.weight, 16, share=1.0))
        exact, rounded = layer.layer(x), layer(x)
        layer.drop = 0.999
        layer.generator.manual_seed(0)
        assert (layer(x) - exact).abs().max() < 0.1 * (rounded - exact).abs().max()
        layer.drop = 0.5
        layer.generator.manual_seed(0)
        one = layer(x)
        layer.generator.manual_seed(0)
        assert torch.equal(layer(x), one) and not torch.equal(one, rounded)

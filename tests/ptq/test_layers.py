"""Quantizers and layers: ranges, searches, gradients, and the fold of the affine into integers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rep_models import within_limits
from torch import nn

from tersor.ptq import quantizers
from tersor.ptq.layers import QuantLayer, operate
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
from tersor.ptq.rounding import LearnedRounding, undecided

LAYERS = {
    "conv": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "strided": lambda: nn.Conv2d(6, 8, 3, stride=2, padding=2, dilation=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
    "reflecting": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "linear": lambda: nn.Linear(6, 8),
}


def quantized(kind: str, *, bits: int = 4, seed: int = 0) -> tuple[QuantLayer, torch.Tensor]:
    torch.manual_seed(seed)
    layer = LAYERS[kind]()
    x = torch.randn(5, 6) if kind == "linear" else torch.randn(5, 6, 9, 8)
    scale, zero = search_activation(x, bits)
    return QuantLayer(
        layer, weight_bits=bits, activation_bits=bits, w_scale=search_weight(layer.weight, bits), a_scale=scale,
        a_zero=zero,
    ), x  # fmt: skip


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

"""Quantized convolutions and linear layers: trainable with the affine of RepAPQ, then integers alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.ptq.quantizers import fake_activation, quantize_weight, rows

Layer = nn.Conv2d | nn.Linear
#: Integers up to here are exact in float32, and so is a sum of them.
_EXACT = 2**24


def operate(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's convolution or product with another weight, without bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    return F.conv2d(_padded(layer, x), weight, None, layer.stride, _padding(layer), layer.dilation, layer.groups)


def _padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    if layer.padding_mode == "zeros":
        return x
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)


def _padding(layer: nn.Conv2d) -> Any:
    return layer.padding if layer.padding_mode == "zeros" else 0


class QuantLayer(nn.Module):
    """A layer whose input and weight are rounded, followed by an affine a channel: gamma op(x^, w^) + beta.

    The affine is what protects a merged kernel: ``w_scale`` says where the grid of a row ends, and ``gamma`` how large
    its steps are in the output, so that a row which was cut off can be made louder. `freeze` folds it away for nothing.

    Args:
        layer: Its weight and bias are where training starts; the bias is ``beta`` from now on.
        weight_bits: 2 to 8, or 16.
        activation_bits: 2 to 8, or 16.
        w_scale: Scales of the weight's rows, ``[out]``.
        a_scale: Scale of the input, a scalar.
        a_zero: Zero point of the input, a scalar.
    """

    def __init__(
        self, layer: Layer, *, weight_bits: int, activation_bits: int, w_scale: Tensor, a_scale: Tensor, a_zero: Tensor
    ) -> None:
        super().__init__()
        # Not a submodule: its own weight is not part of what is trained or stored.
        self._shape = [layer]
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.weight = nn.Parameter(layer.weight.detach().clone())
        channels = len(layer.weight)
        bias = layer.weight.new_zeros(channels) if layer.bias is None else layer.bias.detach()
        self.gamma = nn.Parameter(torch.ones_like(bias))
        self.beta = nn.Parameter(bias.clone())
        self.w_scale = nn.Parameter(w_scale.to(bias).clone())
        self.a_scale = nn.Parameter(a_scale.to(bias).clone())
        self.a_zero: Tensor
        self.register_buffer("a_zero", a_zero.to(bias).clone())
        #: QDrop's share of inputs that stay as they are during a training step; `generator` draws them.
        self.drop, self.generator = 0.0, torch.Generator()

    @property
    def layer(self) -> Layer:
        """What it stands for; only its shape counts."""
        return self._shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """As the layer's own, ``[batch, in, ...]`` to ``[batch, out, ...]``."""
        rounded = fake_activation(x, self.a_scale, self.a_zero, self.activation_bits)
        if self.drop:
            rounded = torch.where(torch.rand(x.shape, generator=self.generator) < self.drop, x, rounded)
        return self.affine(operate(self.layer, rounded, self.integers() * rows(self.w_scale.abs(), self.weight)))

    def integers(self) -> Tensor:
        """The rounded weight, with a gradient; in the shape of ``weight``."""
        return quantize_weight(self.weight, self.w_scale.abs(), self.weight_bits)

    def affine(self, x: Tensor) -> Tensor:
        """gamma x + beta, by channel."""
        if isinstance(self.layer, nn.Linear):
            return x * self.gamma + self.beta
        return x * self.gamma[:, None, None] + self.beta[:, None, None]

    @torch.no_grad()
    def freeze(self) -> IntegerLayer:
        """Fold the affine into integers and scales; exact but for the bias, which goes to the grid of the products.

        w_int sign(gamma), |w_scale| |gamma| and beta are what is left. A channel with gamma 0 is constant.
        """
        ints = self.integers()
        dead = self.gamma.abs() < 1e-12
        sign = torch.where(dead, 0.0, self.gamma.sign())
        ints = ints * rows(sign, ints)
        scale = self.w_scale.abs() * torch.where(dead, 1.0, self.gamma.abs())
        bias = (self.beta.double() / (self.a_scale.double() * scale.double())).round()
        limit = 2**31 - 1
        return IntegerLayer(
            self.layer,
            weight=ints.to(torch.int8 if self.weight_bits <= 8 else torch.int32),
            bias=bias.clamp(-limit, limit).to(torch.int32),
            w_scale=scale.float(),
            a_scale=self.a_scale.detach().float(),
            a_zero=self.a_zero.to(torch.int32),
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
        )


class IntegerLayer(nn.Module):
    """What an integer kernel computes: integer products summed exactly, one multiplication by the scales at the end.

    Args:
        weight: int8 ``[out, ...]``.
        bias: int32 ``[out]``.
        w_scale: float32 ``[out]``.
        a_scale: float32 scalar.
        a_zero: Zero point of the input, int32 scalar.
    """

    def __init__(
        self,
        layer: Layer,
        *,
        weight: Tensor,
        bias: Tensor,
        w_scale: Tensor,
        a_scale: Tensor,
        a_zero: Tensor,
        weight_bits: int,
        activation_bits: int,
    ) -> None:
        super().__init__()
        self._shape = [layer]
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.weight: Tensor
        self.bias: Tensor
        self.w_scale: Tensor
        self.a_scale: Tensor
        self.a_zero: Tensor
        for name, value in (
            ("weight", weight), ("bias", bias), ("w_scale", w_scale), ("a_scale", a_scale), ("a_zero", a_zero),
        ):  # fmt: skip
            self.register_buffer(name, value)
        # Float64 only where float32 could drop a unit: it takes twice the time.
        self._sums = torch.float32 if self.largest_sum() < _EXACT else torch.float64

    @property
    def layer(self) -> Layer:
        """What it stands for; only its shape counts."""
        return self._shape[0]

    def largest_sum(self) -> int:
        """No sum of products, bias included, can be larger."""
        reach = max(int(self.a_zero), 2**self.activation_bits - 1 - int(self.a_zero))
        rows = self.weight.flatten(1).abs().sum(1, dtype=torch.int64)
        return int((reach * rows + self.bias.abs()).max())

    def forward(self, x: Tensor) -> Tensor:
        """As the layer's own; float32 in and out."""
        rounded = (x / self.a_scale).round() + self.a_zero
        integers = rounded.clamp(0, 2**self.activation_bits - 1) - self.a_zero
        dtype = self._sums
        sums = operate(self.layer, integers.to(dtype), self.weight.to(dtype))
        trailing = [1] * (0 if isinstance(self.layer, nn.Linear) else 2)
        sums = sums + self.bias.to(dtype).view(-1, *trailing)
        return (sums * (self.a_scale * self.w_scale).to(dtype).view(-1, *trailing)).to(x.dtype)


class _Grid(nn.Module):
    """A block and the grid of its input or output.

    Args:
        scale: A scalar, as `search_activation` finds it.
        zero: The same.
    """

    def __init__(self, block: nn.Module, scale: Tensor, zero: Tensor, bits: int) -> None:
        super().__init__()
        self.bits, self.inner = bits, block
        self.scale: Tensor
        self.zero: Tensor
        self.register_buffer("scale", scale.float())
        self.register_buffer("zero", zero.to(torch.int32))

    def settle(self, scale: Tensor, zero: Tensor) -> None:
        """Take another grid."""
        self.scale.copy_(scale)
        self.zero.copy_(zero)


class RoundedInput(_Grid):
    """A block whose input is rounded first: a mean over the image comes before the head's layer rounds.

    Without it the last convolution would have no grid to write to, and an integer kernel could not take it.
    """

    def forward(self, x: Tensor) -> Any:
        """The block's output for the rounded ``x``."""
        return self.inner(fake_activation(x, self.scale, self.zero, self.bits))


class RoundedOutput(_Grid):
    """A block whose output is rounded, because not only layers that round it read it: sums, skips, other outputs."""

    def forward(self, x: Tensor) -> Any:
        """The block's output, rounded."""
        return fake_activation(self.inner(x), self.scale, self.zero, self.bits)


def integer_layers(model: nn.Module) -> dict[str, IntegerLayer]:
    """Layers of a quantized model in its order, by the names that they had before."""
    return {
        name.replace(".inner.", ".").removesuffix(".inner"): layer
        for name, layer in model.named_modules()
        if isinstance(layer, IntegerLayer)
    }

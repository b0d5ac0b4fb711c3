"""Small networks of RepVGG's and MobileOne's blocks, with kernels as unruly as those of trained ones."""

from __future__ import annotations

import torch
from torch import nn

from tersor.ptq.config import RepAPQConfig
from tersor.ptq.layers import IntegerLayer, QuantLayer
from tersor.ptq.networks import BranchedConv, RepNet, RepNetConfig
from tersor.ptq.quantizers import search_activation, search_weight, weight_limit

#: Four bits, calibrated for as long as a test may take.
W4 = RepAPQConfig.of("w4a4", iterations=40, init_images=64)
#: A stem, two stages and a head, for images of 16 x 16.
SMALL = {"stem": 16, "stem_stride": 1, "widths": (16, 32), "depths": (2, 3), "strides": (1, 2), "image_size": 16}


def small(kind: str = "repvgg") -> RepNet:
    return RepNet(RepNetConfig(kind=kind, **SMALL))


def unruly(kind: str = "repvgg", seed: int = 0) -> RepNet:
    """An untrained network, some of whose channels are nearly always zero: what training brings about by itself.

    The identity of such a channel is divided by a tiny deviation, so that its merged kernel has one huge entry.
    """
    generator = torch.Generator().manual_seed(seed)
    net = small(kind)
    torch.manual_seed(seed)
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # torch's own start, for which the shift below is right
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, BranchedConv):
                module.norms[0].bias[:3] -= 4
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = None  # an average over all batches
        for _ in range(8):
            net.train()(torch.randn(64, 3, 16, 16, generator=generator))
    return net.eval()


def images(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def within_limits(layer: IntegerLayer) -> bool:
    """Whether all integers lie where their bits allow, and the scales are positive and finite."""
    limit = weight_limit(layer.weight_bits)
    scales = torch.cat([layer.w_scale, layer.a_scale[None]])
    return bool(
        (layer.weight.abs() <= limit).all()
        and (scales > 0).all()
        and torch.isfinite(scales).all()
        and 0 <= int(layer.a_zero) < 2**layer.activation_bits
    )


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

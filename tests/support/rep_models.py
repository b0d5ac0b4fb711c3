"""Small networks of RepVGG's and MobileOne's blocks, with kernels as unruly as those of trained ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tersor.ptq.layers import IntegerLayer
from tersor.ptq.quantizers import weight_limit
from tersor.ptq.reparam import Branch


class RepVGGBlock(nn.Module):
    """3 x 3, 1 x 1 and, where the shape stays, the identity, each with its norm."""

    def __init__(self, inner: int, outer: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(inner, outer, size, stride, size // 2, groups=groups, bias=False) for size in (3, 1)
        )
        same = inner == outer and stride == 1
        self.norms = nn.ModuleList(nn.BatchNorm2d(outer) for _ in range(2 + same))
        self.merged = None

    def branches(self):
        convs = [*self.convs, None]
        return [Branch(conv, norm) for conv, norm in zip(convs, self.norms, strict=False)]

    def replace_branches(self, conv) -> None:
        self.merged, self.convs, self.norms = conv, None, None

    def forward(self, x):
        if self.merged is not None:
            return F.relu(self.merged(x))
        out = sum(norm(conv(x)) for conv, norm in zip(self.convs, self.norms, strict=False))
        return F.relu(out + self.norms[2](x) if len(self.norms) == 3 else out)


class Head(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


class RepNet(nn.Module):
    """A stem, two stages and a head; depthwise blocks between pointwise ones if ``mobile``."""

    def __init__(self, mobile: bool = False, classes: int = 10) -> None:
        super().__init__()

        def block(inner: int, outer: int, stride: int = 1) -> nn.Module:
            if not mobile:
                return RepVGGBlock(inner, outer, stride)
            return nn.Sequential(RepVGGBlock(inner, inner, stride, groups=inner), RepVGGBlock(inner, outer))

        self.stem = RepVGGBlock(3, 16)
        self.stages = nn.Sequential(
            nn.Sequential(block(16, 16), block(16, 16)), nn.Sequential(block(16, 32, 2), block(32, 32), block(32, 32))
        )
        self.head = Head(32, classes)

    def forward(self, x):
        return self.head(self.stages(self.stem(x)))


def unruly(mobile: bool = False, seed: int = 0) -> RepNet:
    """An untrained network, some of whose channels are nearly always zero: what training brings about by itself.

    The identity of such a channel is divided by a tiny deviation, so that its merged kernel has one huge entry.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = RepNet(mobile)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, RepVGGBlock):
                module.norms[0].bias[:3] -= 4
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = None  # an average over all batches
        for _ in range(8):
            net.train()(torch.randn(64, 3, 16, 16, generator=generator))
    return net.eval()


def images(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def integer_layers(model: nn.Module) -> dict[str, IntegerLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, IntegerLayer)}


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

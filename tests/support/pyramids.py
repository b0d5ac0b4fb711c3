"""Networks that are no chain: a U-Net and a feature pyramid of RepVGG's blocks, and ones that share layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.ptq.networks import BranchedConv


def block(inner: int, outer: int, stride: int = 1) -> BranchedConv:
    return BranchedConv(inner, outer, kernels=(3, 1), stride=stride)


def pair(inner: int, outer: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(block(inner, outer, stride), block(outer, outer))


class UNet(nn.Module):
    """Two skips around a bottleneck, joined by concatenation."""

    def __init__(self, widths: tuple[int, int, int] = (8, 12, 16)) -> None:
        super().__init__()
        a, b, c = widths
        self.down1, self.down2, self.down3 = pair(3, a), pair(a, b, 2), pair(b, c, 2)
        self.up2, self.up1, self.out = pair(b + c, b), pair(a + b, a), nn.Conv2d(a, 4, 1)
        self.enlarge = nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(one)
        y = self.up2(torch.cat([self.enlarge(self.down3(two)), two], 1))
        return self.out(self.up1(torch.cat([self.enlarge(y), one], 1)))


class Pyramid(nn.Module):
    """A backbone with a feature pyramid: sums of sizes, and an output of each by name or in a list."""

    def __init__(self, widths: tuple[int, ...] = (12, 16, 24), wide: int = 8, *, named: bool = True) -> None:
        super().__init__()
        self.named, inner, backbone = named, 3, []
        for width in widths:
            backbone.append(pair(inner, width, 2))
            inner = width
        self.backbone = nn.ModuleList(backbone)
        self.sides = nn.ModuleList(nn.Conv2d(width, wide, 1) for width in widths)
        self.outs = nn.ModuleList(nn.Conv2d(wide, wide, 3, padding=1) for _ in widths)

    def forward(self, x: Tensor) -> Any:
        levels = []
        for each in self.backbone:
            levels.append(x := each(x))
        above, found = None, []
        for side, out, level in reversed(list(zip(self.sides, self.outs, levels, strict=True))):
            above = side(level) if above is None else side(level) + F.interpolate(above, scale_factor=2.0)
            found.insert(0, out(above))
        return {f"p{number}": each for number, each in enumerate(found)} if self.named else found


class Shared(nn.Module):
    """One head for two sizes, as detectors have, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = pair(3, 8), pair(8, 8, 2), nn.Conv2d(8, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one = self.first(x)
        return self.head(one), self.up(self.head(self.second(one)))


def settled(model: nn.Module, images: Tensor) -> nn.Module:
    """In eval mode, with norms that have seen images."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(images)
    return model.eval()

"""Small classifiers of RepVGG's and MobileOne's blocks, in training form: branches that `tersor.ptq.reparam` merges."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tersor import _atomic, zoo
from tersor._errors import TersorError
from tersor.ptq.reparam import Branch

KINDS = ("repvgg", "mobileone")
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class RepNetConfig:
    """A network's shape, and what its images must look like.

    Args:
        kind: "repvgg": 3 x 3, 1 x 1 and identity side by side (arXiv 2101.03697). "mobileone": the same depthwise with
            two 3 x 3, then two 1 x 1 and the identity (arXiv 2206.04040).
        stem: Channels of the first block.
        stem_stride: Stride of the first block.
        widths: Channels of each stage.
        depths: Blocks of each stage.
        strides: Stride of each stage's first block.
        classes: Names of what it tells apart.
        image_size: Pixels on a side of an image with three channels.
        mean: Subtracted from pixels from 0 to 1.
        deviation: What the difference is divided by.

    Raises:
        ValueError: If the kind is unknown, or lists differ in length.
    """

    kind: str = "repvgg"
    stem: int = 24
    stem_stride: int = 2
    widths: tuple[int, ...] = (24, 48, 96, 192)
    depths: tuple[int, ...] = (2, 3, 4, 1)
    strides: tuple[int, ...] = (1, 2, 2, 1)
    classes: tuple[str, ...] = tuple("0123456789")
    image_size: int = 32
    mean: float = 0.5
    deviation: float = 0.25

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TersorError(f"kind={self.kind!r} must be one of {KINDS}")
        if not len(self.widths) == len(self.depths) == len(self.strides) > 0:
            raise TersorError(
                f"widths={self.widths}, depths={self.depths} and strides={self.strides} need one value a stage each"
            )


class BranchedConv(nn.Module):
    """Convolutions of several sizes side by side, and the identity where the shape stays; a norm after each.

    Args:
        kernels: Kernel sizes, one branch each.
    """

    def __init__(self, inner: int, outer: int, *, kernels: tuple[int, ...], stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.convs: nn.ModuleList | None = nn.ModuleList(
            nn.Conv2d(inner, outer, size, stride, size // 2, groups=groups, bias=False) for size in kernels
        )
        same = inner == outer and stride == 1
        self.norms: nn.ModuleList | None = nn.ModuleList(nn.BatchNorm2d(outer) for _ in range(len(kernels) + same))
        self.merged: nn.Conv2d | None = None

    def branches(self) -> list[Branch]:
        """All parallel paths; none once they are merged."""
        if self.convs is None or self.norms is None:
            return []
        return [Branch(conv, norm) for conv, norm in zip([*self.convs, None], self.norms, strict=False)]  # type: ignore[arg-type]

    def replace_branches(self, conv: nn.Conv2d) -> None:
        """Compute ``conv`` instead of them from now on."""
        self.merged, self.convs, self.norms = conv, None, None

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, inner, height, width]`` to ``[batch, outer, ...]``, not negative."""
        if self.merged is not None:
            return F.relu(self.merged(x))
        assert self.norms is not None and self.convs is not None
        out: Tensor = sum(norm(conv(x)) for conv, norm in zip(self.convs, self.norms, strict=False))
        return F.relu(out + self.norms[-1](x) if len(self.norms) > len(self.convs) else out)


class Head(nn.Module):
    """Mean over the image, then a linear layer."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, width, height, width]`` to logits ``[batch, classes]``."""
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class RepNet(nn.Module):
    """Stem, stages and head, one after the other; untrained."""

    def __init__(self, config: RepNetConfig) -> None:
        super().__init__()
        self.config = config

        def block(inner: int, outer: int, stride: int) -> nn.Module:
            if config.kind == "repvgg":
                return BranchedConv(inner, outer, kernels=(3, 1), stride=stride)
            return nn.Sequential(
                BranchedConv(inner, inner, kernels=(3, 3, 1), stride=stride, groups=inner),
                BranchedConv(inner, outer, kernels=(1, 1)),
            )

        self.stem = BranchedConv(3, config.stem, kernels=(3, 1), stride=config.stem_stride)
        stages, inner = [], config.stem
        for width, depth, stride in zip(config.widths, config.depths, config.strides, strict=True):
            blocks = [
                block(inner if index == 0 else width, width, stride if index == 0 else 1) for index in range(depth)
            ]
            stages.append(nn.Sequential(*blocks))
            inner = width
        self.stages = nn.Sequential(*stages)
        self.head = Head(inner, len(config.classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d) and config.kind == "repvgg":
                # As timm starts RepVGG: blocks begin small, and some channels never grow.
                nn.init.normal_(module.weight, 0.1, 0.1)
                nn.init.normal_(module.bias, 0.0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` of images ``[batch, 3, height, width]`` as `normalize` gives them."""
        logits: Tensor = self.head(self.stages(self.stem(x)))
        return logits

    def normalize(self, pixels: Tensor) -> Tensor:
        """Float32 images from uint8 pixels ``[batch, 3, height, width]``."""
        return (pixels.float() / 255 - self.config.mean) / self.config.deviation

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        target = Path(folder)
        fields = {"architectures": ["RepNet"], **asdict(self.config)}
        _atomic.write_text(target / CONFIG, json.dumps(fields, indent=1) + "\n")
        _atomic.write_bytes(
            target / WEIGHTS, save({name: each.contiguous() for name, each in self.state_dict().items()})
        )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """What `save_pretrained` wrote, in eval mode."""
        source = Path(folder)
        fields: dict[str, Any] = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        del fields["architectures"]
        fields |= {key: tuple(each) for key, each in fields.items() if isinstance(each, list)}
        net = cls(RepNetConfig(**fields))
        net.load_state_dict(load_file(source / WEIGHTS))
        return net.eval()


def load_network(name: str) -> RepNet:
    """A classifier of the zoo in training form (float32, eval mode); raises `ValueError` for another kind of model."""
    config = json.loads((zoo.path(name) / "config.json").read_text(encoding="utf-8"))
    if config["architectures"] != ["RepNet"]:
        raise TersorError(f"{name} classifies no images; tiny-repvgg and tiny-mobileone do")
    return RepNet.from_pretrained(zoo.path(name))

"""Branches of reparameterized blocks, merged into one convolution in double precision and checked."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor._errors import TersorError
from tersor.ptq.outputs import tensors_of

#: Methods that merge a block's branches: timm's, and those of the authors of RepVGG and of MobileOne.
_METHODS = ("reparameterize", "switch_to_deploy", "fuse")
#: Largest difference of outputs over the largest output. Ours is that of double precision; other libraries' own methods
#: go through single precision, block after block.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Branch:
    """One of the parallel paths of a block: a convolution, or None for the identity, and the norm after it."""

    conv: nn.Conv2d | None
    norm: nn.BatchNorm2d | None


@runtime_checkable
class RepBlock(Protocol):
    """A block that shows its branches, so that they can be merged; blocks of timm need not."""

    def branches(self) -> list[Branch]:
        """All parallel paths, whose sum goes on; none if they are merged already."""

    def replace_branches(self, conv: nn.Conv2d) -> None:
        """Compute ``conv`` instead of them from now on."""


def merge_branches(branches: Iterable[Branch]) -> nn.Conv2d:
    """One convolution, float64, that computes the sum of the branches.

    With t = gamma / sqrt(var + eps) of a branch's norm, the kernel is the sum of t K and the bias the sum of
    t b + beta - t mean (RepVGG, arXiv 2101.03697, section 3.3). Smaller kernels are padded to the largest one, and the
    identity is a kernel with a one in its centre.

    Raises:
        ValueError: If branches have no convolution, or cannot be added.
    """
    branches = list(branches)
    convs = [branch.conv for branch in branches if branch.conv is not None]
    if not convs:
        raise TersorError("a block needs a convolution among its branches")
    like = max(convs, key=lambda conv: conv.kernel_size[0])
    merged = nn.Conv2d(
        like.in_channels,
        like.out_channels,
        like.kernel_size,  # type: ignore[arg-type]
        like.stride,  # type: ignore[arg-type]
        like.padding,  # type: ignore[arg-type]
        like.dilation,  # type: ignore[arg-type]
        like.groups,
        padding_mode=like.padding_mode,
        device=like.weight.device,
        dtype=torch.float64,
    )
    assert merged.bias is not None
    kernel, bias = torch.zeros_like(merged.weight), torch.zeros_like(merged.bias)
    for branch in branches:
        own, shift = _kernel(branch, like)
        kernel, bias = kernel + own, bias + shift
    with torch.no_grad():
        merged.weight.copy_(kernel)
        merged.bias.copy_(bias)
    return merged


def _kernel(branch: Branch, like: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Kernel and bias of one branch, float64, in the shape of ``like``."""
    size = like.kernel_size[0]
    if branch.conv is None:
        if like.in_channels != like.out_channels or set(like.stride) != {1}:
            raise TersorError(
                f"an identity branch beside a convolution of {like.in_channels} to {like.out_channels} channels with "
                f"stride {like.stride}: it can only be added where both keep the shape"
            )
        kernel = like.weight.new_zeros(like.weight.shape, dtype=torch.float64)
        channels = torch.arange(like.out_channels)
        kernel[channels, channels % (like.in_channels // like.groups), size // 2, size // 2] = 1.0
        bias = kernel.new_zeros(like.out_channels)
    else:
        conv = branch.conv
        if (conv.stride, conv.groups, conv.out_channels) != (like.stride, like.groups, like.out_channels):
            raise TersorError(f"branches {conv} and {like} differ in stride, groups or channels and cannot be added")
        border = (size - conv.kernel_size[0]) // 2
        kernel = F.pad(conv.weight.double(), [border] * 4)
        bias = kernel.new_zeros(like.out_channels) if conv.bias is None else conv.bias.double()
    if branch.norm is None:
        return kernel, bias
    scale, shift = _affine(branch.norm)
    return kernel * scale[:, None, None, None], bias * scale + shift


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Factor and summand of a norm in eval mode, float64."""
    if norm.running_mean is None or norm.running_var is None:
        raise TersorError(f"{norm} keeps no running statistics, so that it has no fixed factor to merge")
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    scale = gamma / (variance + norm.eps).sqrt()
    return scale, beta - mean * scale


@torch.no_grad()
def merge(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of ``model`` (eval mode, its own dtype) in which every block is one convolution.

    Blocks are `RepBlock`, or have one of timm's and the authors' methods. A batch norm that is left right after a
    convolution goes into it.

    Args:
        example: ``[batch, channels, height, width]`` as the model takes it; outputs before and after are compared on it
            in double precision.

    Raises:
        ValueError: If there is nothing to merge, if ``example`` does not fit or gives NaN, or if outputs differ.
    """
    parameter = next(model.parameters())
    exact = copy.deepcopy(model).eval().double()
    try:
        before = list(tensors_of(exact(example.to(parameter.device).double())))
    except RuntimeError as error:
        raise TersorError(f"the model does not take images of {tuple(example.shape[1:])}: {error}") from None
    if not before:
        raise TersorError(f"{type(model).__name__} gives no tensors, but a {type(model(example)).__name__}")
    if not all(bool(torch.isfinite(each).all()) for each in before):
        raise TersorError("the model gives NaN or infinity for the calibration images: check its weights")
    merged = _merge_children(exact)
    if not merged:
        raise TersorError(_nothing(exact))
    _fold_norms(exact)
    for module in exact.modules():
        if getattr(module, "inplace", False):
            setattr(module, "inplace", False)  # noqa: B010  # kept activations are used again
    after = tensors_of(exact(example.to(parameter.device).double()))
    changed = max(
        float((one - other).abs().max() / one.abs().max().clamp_min(1e-300))
        for one, other in zip(before, after, strict=True)
    )
    if not changed <= TOLERANCE:
        raise TersorError(
            f"merging changed the outputs by {changed:.1e} of the largest one; blocks: {', '.join(merged)}"
        )
    return exact.to(parameter.dtype)


def _merge_children(module: nn.Module, prefix: str = "") -> list[str]:
    """Merge every block below ``module``; returns their names."""
    found = []
    for name, child in list(module.named_children()):
        full = f"{prefix}{name}"
        before = len(list(child.modules()))
        if isinstance(child, RepBlock):
            if branches := child.branches():
                child.replace_branches(merge_branches(branches))
        elif (method := next((each for each in _METHODS if hasattr(child, each)), None)) is not None:
            replaced = getattr(child, method)()
            if isinstance(replaced, nn.Module):
                setattr(module, name, replaced.double())
        new: nn.Module = getattr(module, name)
        if new is not child or len(list(new.modules())) != before:
            found.append(full)
        else:
            found += _merge_children(new, f"{full}.")
    return found


def _fold_norms(module: nn.Module) -> None:
    """Put batch norms that come right after a convolution of the same parent into it."""
    children = list(module.named_children())
    for (name, conv), (other, norm) in pairwise(children):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.num_features == conv.out_channels:
            setattr(module, name, merge_branches([Branch(conv, norm)]))
            # Some norms bring their activation along.
            setattr(module, other, getattr(norm, "act", None) or nn.Identity())
    for _, child in module.named_children():
        _fold_norms(child)


def _nothing(model: Any) -> str:
    """Why there was nothing to merge."""
    blocks = [
        type(each).__name__
        for each in model.modules()
        if isinstance(each, RepBlock) or any(hasattr(each, name) for name in _METHODS)
    ]
    if blocks:
        return (
            f"every block of this {type(model).__name__} is one convolution already ({blocks[0]}); "
            "give the model in its training form, with the branches' weights"
        )
    return (
        f"{type(model).__name__} has no blocks with branches: none has one of the methods {', '.join(_METHODS)}, "
        "nor branches() and replace_branches(); see tersor.ptq.reparam.RepBlock"
    )

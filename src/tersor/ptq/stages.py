"""A merged network as a chain of stages of blocks: what calibration goes through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor._errors import TersorError


@dataclass(frozen=True)
class Stage:
    """Blocks between two reductions, by their names in the model; the model computes them one after the other."""

    name: str
    blocks: tuple[str, ...]


def find_stages(model: nn.Module, example: Tensor, stages: Sequence[Sequence[str]] | None = None) -> list[Stage]:
    """The chain of a model with ``stages``, as timm's RepVGG and MobileOne have it, or the one that is given.

    The stem, each element of ``stages``, and what comes after are a stage each; the blocks of a stage are its children.

    Raises:
        ValueError: If the blocks, one after the other, do not give what the model gives.
    """
    found = [Stage(blocks[0], tuple(blocks)) for blocks in stages] if stages is not None else _by_name(model)
    with torch.no_grad():
        exact, x = model(example), example
        try:
            for stage in found:
                for name in stage.blocks:
                    x = model.get_submodule(name)(x)
            if not isinstance(exact, Tensor) or not isinstance(x, Tensor):
                raise TersorError(_no_chain(model, found, "there are several outputs"))
        except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
            raise TersorError(_no_chain(model, found, str(error).splitlines()[0])) from None
    if x.shape != exact.shape or not torch.allclose(x, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max())):
        raise TersorError(_no_chain(model, found, "their output is another one"))
    return found


def _by_name(model: nn.Module) -> list[Stage]:
    found: list[Stage] = []
    for name, child in model.named_children():
        if isinstance(child, nn.Identity):
            continue
        if name != "stages":
            found.append(Stage(name, (name,)))
            continue
        for number, stage in child.named_children():
            blocks = tuple(f"{name}.{number}.{block}" for block, _ in stage.named_children())
            found.append(
                Stage(f"{name}.{number}", blocks if isinstance(stage, nn.Sequential) else (f"{name}.{number}",))
            )
    return found


def _no_chain(model: nn.Module, found: list[Stage], reason: str) -> str:
    return (
        f"{type(model).__name__} is no chain of {', '.join(stage.name for stage in found)}: {reason}. Supported are "
        "timm's RepVGG and MobileOne; for another chain give stages=[[names of blocks], ...]"
    )

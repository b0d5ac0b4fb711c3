"""Residuals into a stock UNet by hooks, which come off whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

#: Residuals of the skips, and of the middle; None where a call is to stay as it is.
Residuals = tuple[Sequence[Tensor], Tensor] | None


@contextmanager
def injected(unet: nn.Module, residuals: Callable[..., Residuals]) -> Iterator[None]:
    """Within it, each call of an SVD UNet adds residuals to its skips and to its middle.

    The UNet may be any with the blocks of diffusers' `UNetSpatioTemporalConditionModel`: with adapters, quantized,
    offloaded, or with gradient checkpointing.

    Args:
        unet: Its own code is not changed.
        residuals: Called with the arguments of each of the UNet's calls.
    """
    blocks: Any = unet
    pending: list[Any] = [None, None]

    def begin(module: nn.Module, args: Any, keywords: dict[str, Any]) -> None:
        found = residuals(*args, **keywords)
        pending[:] = [None, None] if found is None else [list(found[0]), found[1]]

    def up(block: Any, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if pending[0] is None:
            return None
        count = len(block.resnets)
        own, pending[0] = pending[0][-count:], pending[0][:-count]
        skips = keywords["res_hidden_states_tuple"]
        added = tuple(skip + each.to(skip) for skip, each in zip(skips, own, strict=True))
        return args, {**keywords, "res_hidden_states_tuple": added}

    def middle(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        return None if pending[1] is None else out + pending[1].to(out)

    hooks = [unet.register_forward_pre_hook(begin, with_kwargs=True)]
    hooks += [block.register_forward_pre_hook(up, with_kwargs=True) for block in blocks.up_blocks]
    hooks.append(blocks.mid_block.register_forward_hook(middle))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

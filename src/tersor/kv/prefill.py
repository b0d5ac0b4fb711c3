"""Prefill: how a layer attends while nothing of its sequence is compressed yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Prefill(Protocol):
    """What the engine asks of a prefill; a frozen dataclass that holds no tensors."""

    def attend(self, library: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Output (and weights or None) of attention over raw keys; ``library`` is the dense implementation."""


@dataclass(frozen=True)
class DensePrefill:
    """Every token attends to every earlier one, by the library's own kernel."""

    def attend(self, library: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output: tuple[Tensor, Tensor | None] = library(*args, **kwargs)
        return output

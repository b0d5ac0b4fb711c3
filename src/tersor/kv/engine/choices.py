"""Prefill: how a layer attends while nothing of its sequence is compressed yet.

A prefill may leave tokens out of the attention; it then tells the layer, before the output is computed, which ones
stay (`CompressedLayer.decide`), so that one choice serves both. See `tersor.kv.prefill.sparse`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Prefill(Protocol):
    """What the engine asks of a prefill; a frozen dataclass that holds no tensors."""

    def attend(self, library: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Output (and weights or None) of attention over raw keys; ``library`` is the dense implementation.

        The other arguments are those of transformers' attention functions, and those that ``library`` takes. The key
        is tagged with its cache layer, or has no tag in a forward without a cache.
        """


@dataclass(frozen=True)
class DensePrefill:
    """Every token attends to every earlier one, by the library's own kernel."""

    def attend(self, library: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output: tuple[Tensor, Tensor | None] = library(*args, **kwargs)
        return output

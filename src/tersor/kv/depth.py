"""Depth: how the cache layers of a model relate to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tersor.kv.layer import CompressedLayer

if TYPE_CHECKING:
    from tersor.kv.method import KVMethod


class Depth(Protocol):
    """What the engine asks of a depth; a frozen dataclass that holds no tensors."""

    def build(self, method: KVMethod, layer_indices: list[int]) -> dict[int, CompressedLayer]:
        """One cache layer for each of the model's layers that tersor compresses."""


@dataclass(frozen=True)
class SeparateLayers:
    """Every layer keeps its own tokens."""

    def build(self, method: KVMethod, layer_indices: list[int]) -> dict[int, CompressedLayer]:
        return {index: CompressedLayer(method, index) for index in layer_indices}

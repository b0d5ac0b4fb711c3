"""Depth: how the cache layers of a model relate to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedConfig

from tersor.kv.engine.choices import Choices
from tersor.kv.engine.layer import CompressedLayer


class Depth(Protocol):
    """What the engine asks of a depth; a frozen dataclass that holds no tensors."""

    def check(self, choices: Choices) -> None:
        """Raise `ValueError` if another choice does not go with this depth."""

    def build(self, choices: Choices, layers: list[int], config: PreTrainedConfig) -> dict[int, CompressedLayer]:
        """One cache layer for each of the model's ``layers`` that are compressed; ``config`` is the text decoder's."""


@dataclass(frozen=True)
class SeparateLayers:
    """Every layer keeps its own tokens."""

    def check(self, choices: Choices) -> None:
        """Everything goes with it."""

    def build(self, choices: Choices, layers: list[int], config: PreTrainedConfig) -> dict[int, CompressedLayer]:
        return {index: CompressedLayer(choices, index) for index in layers}

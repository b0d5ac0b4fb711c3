"""Depth: how the cache layers of a model relate to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedConfig

from tersor._errors import TersorError
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


@dataclass(frozen=True)
class PlannedLayers:
    """Every layer keeps its own tokens by choices of its own.

    Args:
        own: The choices of each layer that is compressed, in the model's order.
    """

    own: tuple[Choices, ...]

    def check(self, choices: Choices) -> None:
        """Everything goes with it."""

    def build(self, choices: Choices, layers: list[int], config: PreTrainedConfig) -> dict[int, CompressedLayer]:
        """See `Depth`; raises `ValueError` for a model with another number of layers to compress."""
        if len(layers) != len(self.own):
            raise TersorError(
                f"the plan is for {len(self.own)} compressed layers, this model ({type(config).__name__}) has "
                f"{len(layers)}; make one for it: tersor tune"
            )
        return {index: CompressedLayer(own, index) for index, own in zip(layers, self.own, strict=True)}

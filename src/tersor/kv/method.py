"""A KV method: four independent choices about a cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedConfig

from tersor.kv.depth.base import Depth, SeparateLayers
from tersor.kv.engine.cache import CompressedCache
from tersor.kv.engine.choices import Choices
from tersor.kv.session import Session


@dataclass(frozen=True, kw_only=True)
class KVMethod(Choices):
    """How a cache is compressed; recipes such as `ZipCache` make one.

    Args:
        depth: How layers share what they store; the other choices are those of `Choices`.

    Raises:
        ValueError: For an option outside its range, or choices that contradict each other.
    """

    depth: Depth = field(default_factory=SeparateLayers)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.depth.check(self)

    def cache(self, config: PreTrainedConfig, *, offloading: bool = False) -> CompressedCache:
        """An empty cache for a model of this ``config``, to pass as ``past_key_values``."""
        return CompressedCache(config, self, self.depth.build, offloading=offloading)

    def on(self, model: nn.Module) -> Session:
        """A session for ``model``: use it in a ``with`` statement, or call `enable` and `disable`."""
        return Session(self, self.cache, model)

"""The library's own quantized caches: groups along the channels, the newest 128 tokens raw."""

from __future__ import annotations

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, QuantizedCache

from tersor._lazy import require


def quanto_cache(config: PreTrainedConfig, *, bits: int, group_size: int) -> Cache:
    """`QuantizedCache` with optimum-quanto. Raises `MissingExtraError` without it."""
    require("optimum.quanto", "bench")
    return QuantizedCache("quanto", config, nbits=bits, q_group_size=group_size)


def hqq_cache(config: PreTrainedConfig, *, bits: int, group_size: int) -> Cache:
    """`QuantizedCache` with hqq, which groups along axis 1. Raises `ImportError` without it."""
    return QuantizedCache("hqq", config, nbits=bits, q_group_size=group_size, axis_key=1, axis_value=1)

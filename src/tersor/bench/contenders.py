"""Caches that `tersor bench kv` compares: ours, its ablations on the same engine, and what users have already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

from tersor._lazy import require
from tersor.kv.cache import CompressedCache
from tersor.kv.method import KVMethod
from tersor.kv.selection import RandomSelection, RatioSelection, RecentSelection, SaliencySelection
from tersor.kv.storage import MixedPrecisionStorage
from tersor.kv.tree import iter_tensors
from tersor.kv.zipcache import ZipCache

FULL = "full cache"


@dataclass(frozen=True)
class Contender:
    """One alternative: ``build`` makes its empty cache for a model configuration."""

    name: str
    family: str
    build: Callable[[PreTrainedConfig], Cache]


def _ours(name: str, family: str, recipe: ZipCache) -> Contender:
    return Contender(name, family, recipe.cache)


def _selected(name: str, family: str, selection: RatioSelection, *, high: int, low: int) -> Contender:
    method = KVMethod(selection=selection, storage=MixedPrecisionStorage(high_bits=high, low_bits=low))
    return Contender(name, family, method.cache)


def _accumulated(ratio: float) -> SaliencySelection:
    """Accumulated attention over every row of the prompt, as H2O and MiKV compute it."""
    return SaliencySelection(ratio=ratio, normalization="none", probe_recent_ratio=1.0, probe_random_ratio=0.0)


def _builtin(bits: int, group: int) -> Contender:
    def build(config: PreTrainedConfig) -> Cache:
        require("optimum.quanto", "bench")
        return QuantizedCache("quanto", config, nbits=bits, q_group_size=group)

    return Contender(f"QuantizedCache quanto {bits}-bit", "transformers", build)


def contenders(group_size: int = 32) -> list[Contender]:
    """Every alternative of the full benchmark; ``group_size`` is that of the built-in quantized caches."""
    normalized, ratio = SaliencySelection(ratio=0.6), 0.6
    # Keeping 20 % raw at 16 bits costs what 60/40 at 4/2 bits costs: 3.2 bits a number.
    equal = 0.2
    rows = [
        Contender(FULL, "full", lambda config: DynamicCache(config=config)),
        *(_ours(f"ZipCache 4/2 r={r}", "ZipCache", ZipCache(saliency_ratio=r)) for r in (0.2, 0.4, 0.6, 0.8)),
        _ours("uniform 4-bit", "uniform", ZipCache(saliency_ratio=1.0, high_bits=4)),
        _ours("uniform 2-bit", "uniform", ZipCache(saliency_ratio=1.0, high_bits=2)),
        _selected("4/2 accumulated", "4/2 by another metric", _accumulated(ratio), high=4, low=2),
        _selected("4/2 recent", "4/2 by another metric", RecentSelection(ratio=ratio), high=4, low=2),
        _selected("4/2 random", "4/2 by another metric", RandomSelection(ratio=ratio), high=4, low=2),
        _selected("evict to 20% normalized", "eviction", replace(normalized, ratio=equal), high=16, low=0),
        _selected("evict to 20% accumulated", "eviction", _accumulated(equal), high=16, low=0),
        _selected("evict to 20% recent", "eviction", RecentSelection(ratio=equal), high=16, low=0),
    ]
    for ratio in (0.4, 0.6):
        percent = f"{ratio:.0%}"
        rows += [
            _selected(f"4/0 {percent} normalized", "4/0", SaliencySelection(ratio=ratio), high=4, low=0),
            _selected(f"4/0 {percent} accumulated", "4/0", _accumulated(ratio), high=4, low=0),
            _selected(f"4/0 {percent} recent", "4/0", RecentSelection(ratio=ratio), high=4, low=0),
            _selected(f"4/0 {percent} random", "4/0", RandomSelection(ratio=ratio), high=4, low=0),
        ]
    return [*rows, _builtin(4, group_size), _builtin(2, group_size)]


def pick(names: list[str] | None = None, *, group_size: int = 32) -> list[Contender]:
    """The contenders of these names, the full cache always first; all of them for None.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    everyone = contenders(group_size)
    if names is None:
        return everyone
    known = {each.name for each in everyone}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no contender is called {unknown}; choose from {sorted(known)}")
    return [each for each in everyone if each.name == FULL or each.name in names]


def bytes_at_half_precision(cache: Cache) -> int:
    """Bytes that ``cache`` would hold for a 16-bit model.

    Parameters, codes and masks count as they are; what is kept in model precision counts 2 bytes a number, so that
    a float32 test model does not make raw tokens look twice as expensive.
    """
    return sum(
        tensor.numel() * min(tensor.itemsize, 2 if tensor.is_floating_point() else tensor.itemsize)
        for tensor in _tensors(cache)
    )


def _tensors(cache: Cache) -> list[Tensor]:
    if isinstance(cache, CompressedCache):
        found = [tensor for layer in cache.compressed_layers() for _, tensor in iter_tensors(layer.owned())]
    else:
        found = []
        for layer in cache.layers:
            for value in vars(layer).values():
                found += _inner(value)
    return list({id(tensor): tensor for tensor in found}.values())


def _inner(value: object) -> list[Tensor]:
    """Plain tensors in a layer's attribute: quanto's subclasses wrap theirs."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            return [tensor for name in names for tensor in _inner(getattr(value, name))]
        return [value]
    return []


def half_precision_dense(config: PreTrainedConfig, batch: int, tokens: int) -> int:
    """Bytes of a dense 16-bit cache of ``tokens`` tokens."""
    text = config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * 2 * batch * tokens * text.num_hidden_layers * text.num_key_value_heads * head_dim)


def token_ids(texts: Sequence[str], encode: Callable[[str], list[int]]) -> Tensor:
    """Equal-length texts as ids ``[batch, tokens]``."""
    return torch.tensor([encode(text) for text in texts])

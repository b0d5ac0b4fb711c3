"""Caches that `tersor bench kv` compares: ours, its ablations on the same engine, and what users have already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from tersor._errors import TersorError
from tersor._lazy import MissingExtraError, advice, installed
from tersor.kv.bench.peers.builtin import hqq_cache, quanto_cache
from tersor.kv.bench.peers.cast import Cast
from tersor.kv.bench.peers.h2o import HeavyHitterSelection
from tersor.kv.bench.peers.rotated import Rotated
from tersor.kv.bench.peers.snapkv import SnapSelection
from tersor.kv.bench.peers.stored import Form, stored_cache
from tersor.kv.bench.peers.streaming_llm import SinkSelection
from tersor.kv.engine.cache import CompressedCache
from tersor.kv.engine.tree import iter_tensors
from tersor.kv.method import KVMethod
from tersor.kv.selection.ratio import RandomSelection, RatioSelection, RecentSelection, SaliencySelection
from tersor.kv.storage.mixed import MixedPrecisionStorage
from tersor.kv.zipcache import ZipCache

FULL = "full cache"


@dataclass(frozen=True)
class Contender:
    """One alternative: ``build`` makes its empty cache for a model configuration."""

    name: str
    family: str
    build: Callable[[PreTrainedConfig], Cache]
    package: str | None = None
    """What it needs beside tersor, of the extra ``bench``."""


def _ours(name: str, family: str, recipe: ZipCache) -> Contender:
    return Contender(name, family, recipe.cache)


def _selected(
    name: str, family: str, selection: RatioSelection, *, high: int, low: int, streaming_gap: int | None = 100
) -> Contender:
    storage = MixedPrecisionStorage(high_bits=high, low_bits=low)
    method = KVMethod(name=name, selection=selection, storage=storage, streaming_gap=streaming_gap)
    return Contender(name, family, method.cache)


def _stored(name: str, form: Form) -> Contender:
    return Contender(name, "peer", partial(stored_cache, form=form))


def _accumulated(ratio: float) -> SaliencySelection:
    """Accumulated attention over every row of the prompt, as H2O and MiKV compute it."""
    return SaliencySelection(ratio=ratio, normalization="none", probe_recent_ratio=1.0, probe_random_ratio=0.0)


def _builtin(backend: str, package: str, build: Callable[..., Cache], bits: int, group: int) -> Contender:
    name = f"QuantizedCache {backend} {bits}-bit"
    return Contender(name, "transformers", partial(build, bits=bits, group_size=group), package)


def peers(group_size: int = 32) -> list[Contender]:
    """What else users would pick, as far as it runs here; evictions keep 20 %, the bytes of 3.2 bits a number."""
    keep = 0.2
    rows = [
        _stored("bf16 cache", Cast(torch.bfloat16)),
        _stored("fp8 cache", Cast(torch.float8_e4m3fn)),
        _stored("rotated 4-bit", Rotated(4)),
        _selected("uniform 3-bit", "peer", SaliencySelection(ratio=1.0), high=3, low=2),
        _selected("StreamingLLM-like 20%", "peer", SinkSelection(ratio=keep), high=16, low=0),
        _selected("H2O-like 20%", "peer", HeavyHitterSelection(ratio=keep), high=16, low=0),
        # SnapKV compresses the prompt alone: what is generated stays.
        _selected("SnapKV-like 20%", "peer", SnapSelection(ratio=keep), high=16, low=0, streaming_gap=None),
    ]
    if installed("hqq"):
        rows += [_builtin("hqq", "hqq", hqq_cache, bits, group_size) for bits in (4, 2)]
    return rows


def contenders(group_size: int = 32, *, with_peers: bool = False) -> list[Contender]:
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
    rows += [_builtin("quanto", "optimum.quanto", quanto_cache, bits, group_size) for bits in (4, 2)]
    return [*rows, *peers(group_size)] if with_peers else rows


def pick(names: list[str] | None = None, *, group_size: int = 32, with_peers: bool = False) -> list[Contender]:
    """The contenders of these names, the full cache always first; all of them for None.

    ``with_peers`` adds `peers` to what is picked; their names are known without it too.

    Raises:
        ValueError: For an unknown name, listing the known ones.
        MissingExtraError: If one of them cannot run here.
    """
    if names is None:
        return _all_run(contenders(group_size, with_peers=with_peers))
    everyone = contenders(group_size, with_peers=True)
    if with_peers:
        names = names + [each.name for each in peers(group_size)]
    known = {each.name for each in everyone}
    if unknown := [name for name in names if name not in known]:
        raise TersorError(f"no contender is called {unknown}; choose from {sorted(known)}")
    return _all_run([each for each in everyone if each.name == FULL or each.name in names])


def _all_run(chosen: list[Contender]) -> list[Contender]:
    for each in chosen:
        if each.package is not None and not installed(each.package):
            raise MissingExtraError(f"{each.name!r}: {advice(each.package, 'bench')}")
    return chosen


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
        found = [
            tensor for layer in cache.compressed_layers() for _, tensor in iter_tensors(list(layer.owned().values()))
        ]
    else:
        found = []
        for layer in cache.layers:
            for value in vars(layer).values():
                found += _inner(value)
    return list({id(tensor): tensor for tensor in found}.values())


def _inner(value: object) -> list[Tensor]:
    """Plain tensors in a layer's attribute: quanto's subclasses wrap theirs, hqq's parameters lie in a dictionary."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            return [tensor for name in names for tensor in _inner(getattr(value, name))]
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in _inner(item)]
    return []


def half_precision_dense(config: PreTrainedConfig, batch: int, tokens: int) -> int:
    """Bytes of a dense 16-bit cache of ``tokens`` tokens."""
    text = config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * 2 * batch * tokens * text.num_hidden_layers * text.num_key_value_heads * head_dim)


def token_ids(texts: Sequence[str], encode: Callable[[str], list[int]]) -> Tensor:
    """Equal-length texts as ids ``[batch, tokens]``."""
    return torch.tensor([encode(text) for text in texts])

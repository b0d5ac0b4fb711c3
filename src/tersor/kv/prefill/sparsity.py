"""What a sparse prefill saved: ratios, attention FLOPs, captured mass and exact bytes (ZipVL, section 2.8)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from tersor.bench.measure import storage_bytes
from tersor.kv.depth.base import layer_types
from tersor.kv.engine.layer import CompressedLayer

if TYPE_CHECKING:
    from tersor.kv.engine.cache import CompressedCache
    from tersor.kv.prefill.hook import ForwardState, LayerRecord


@dataclass(frozen=True, kw_only=True)
class SparsityStats:
    """Figures of one prompt, protected tokens included. Layers that stay dense count with a ratio of 1.

    ``tokens``: of each row, padding left out. ``token_ratio``: mean share of tokens that take part in attention, with
    its parts ``per_layer`` and ``per_row``. ``visual_ratio``, ``visual_per_layer``: the same over visual tokens, None
    where there are none. ``attn_flops_reduction``: 1 - (mean ratio)^2, as the paper counts;
    ``attn_flops_reduction_exact``: 1 - mean of the squares. Where only keys are restricted (``query_mode="compute"``)
    both are 1 - mean ratio. ``captured_mass``, ``mass_per_layer``: share of the probed attention that kept tokens hold.
    ``kv_bytes``: everything that the cache stores now; ``kv_dense_bytes``: 16 bits for every key and value of the
    tokens seen; ``physical_lengths``: token slots a row of each layer, empty ones of uneven batches included. These are
    0 and empty without a cache. ``skipped_reason``: why no layer left anything out, or None. ``kept``: columns of the
    input that take part, int64, by layer and row; not part of `to_dict`.
    """

    tokens: tuple[int, ...]
    token_ratio: float
    per_layer: tuple[float, ...]
    per_row: tuple[float, ...]
    visual_ratio: float | None
    visual_per_layer: tuple[float, ...] | None
    attn_flops_reduction: float
    attn_flops_reduction_exact: float
    captured_mass: float
    mass_per_layer: tuple[float, ...]
    kv_bytes: int
    kv_dense_bytes: int
    physical_lengths: tuple[int, ...]
    skipped_reason: str | None
    kept: tuple[tuple[Tensor, ...], ...] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON takes them; tuples become lists."""
        named = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "kept"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in named.items()}


def sparsity_stats(state: ForwardState, cache: CompressedCache | None, config: PreTrainedConfig) -> SparsityStats:
    """The figures of the forward that ``state`` belongs to.

    Raises:
        ValueError: if the forward has not reached a layer that may be sparse.
    """
    if not state.records:
        raise ValueError(
            "the forward met no layer that may be sparse; is the model run inside `with method.on(model):`?"
        )
    layers = len(layer_types(config.get_text_config(decoder=True)))
    some = next(iter(state.records.values()))
    everything = [own.nonzero()[:, 0] for own in some.prompt.cpu()]
    rows = [row for row, own in enumerate(everything) if len(own)]
    kept = [_columns(record) if (record := state.records.get(index)) else everything for index in range(layers)]
    ratio = torch.tensor([[_share(own[row], everything[row]) for row in rows] for own in kept], dtype=torch.float64)
    visual = None
    if state.visual is not None:
        flags = state.visual.cpu()
        seen = [row for row in rows if bool(flags[row, everything[row]].any())]
        shares = [
            [_share(own[row][flags[row, own[row]]], everything[row][flags[row, everything[row]]]) for row in seen]
            for own in kept
        ]
        visual = torch.tensor(shares, dtype=torch.float64).mean(1) if seen else None
    mass = [float(r.mass[rows].mean()) if (r := state.records.get(index)) else 1.0 for index in range(layers)]
    mean = float(ratio.mean())
    drops = state.method.prefill.query_mode == "drop"  # type: ignore[attr-defined]
    reasons = {record.skipped for record in state.records.values()}
    return SparsityStats(
        tokens=tuple(map(len, everything)),
        token_ratio=mean,
        per_layer=tuple(ratio.mean(1).tolist()),
        per_row=tuple(ratio.mean(0).tolist()),
        visual_ratio=None if visual is None else float(visual.mean()),
        visual_per_layer=None if visual is None else tuple(visual.tolist()),
        attn_flops_reduction=1 - mean**2 if drops else 1 - mean,
        attn_flops_reduction_exact=1 - float(ratio.square().mean()) if drops else 1 - mean,
        captured_mass=sum(mass) / layers,
        mass_per_layer=tuple(mass),
        kv_bytes=0 if cache is None else _stored(cache),
        kv_dense_bytes=0 if cache is None else _dense(cache),
        physical_lengths=() if cache is None else tuple(_physical(layer) for layer in cache.layers),
        skipped_reason=None if None in reasons else " and ".join(sorted(map(str, reasons))),
        kept=tuple(tuple(own) for own in kept),
    )


def _columns(record: LayerRecord) -> list[Tensor]:
    index = record.kept.index[:, 0].cpu()
    if record.kept.valid is None:
        return list(index)
    return [own[valid] for own, valid in zip(index, record.kept.valid[:, 0].cpu(), strict=True)]


def _share(part: Tensor, whole: Tensor) -> float:
    return len(part) / max(len(whole), 1)


def _stored(cache: CompressedCache) -> int:
    """Bytes of all layers: codes, parameters, positions, masks, buffers; the library's own layers too."""
    return cache.memory_footprint() + storage_bytes(
        [(layer.keys, layer.values) for layer in _others(cache) if layer.is_initialized]
    )


def _dense(cache: CompressedCache) -> int:
    others = [layer for layer in _others(cache) if layer.is_initialized]
    return cache.dense_footprint() + sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in others)


def _others(cache: CompressedCache) -> list[Any]:
    """Layers of the library's own that hold keys and values."""
    return [each for each in cache.layers if not isinstance(each, CompressedLayer) and hasattr(each, "keys")]


def _physical(layer: Any) -> int:
    if isinstance(layer, CompressedLayer):
        return layer.waiting + sum(group.positions.shape[-1] for part in layer.segments for group in part.groups)
    keys = getattr(layer, "keys", None)
    return 0 if keys is None else int(keys.shape[-2])

"""What a sparse prefill saved: ratios, attention FLOPs, captured mass and exact bytes (ZipVL, section 2.8)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from tersor._errors import TersorError
from tersor.bench.measure import storage_bytes
from tersor.kv.engine.cache import CompressedCache, layer_types
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.engine.state import ForwardState


@dataclass(frozen=True, kw_only=True)
class SparsityStats:
    """Figures of one prompt, protected tokens included. Layers that stay dense count with a ratio of 1.

    Args:
        tokens: Tokens of each row, padding left out.
        token_ratio: Share of tokens that take part in attention, mean over layers and rows.
        per_layer: Its mean over rows, by layer.
        per_row: Its mean over layers, by row.
        visual_ratio: The same as ``token_ratio`` over visual tokens, None where there are none.
        visual_per_layer: Likewise by layer.
        visual_per_row: Likewise by row, None for rows without visual tokens; None where there are none at all.
        attn_flops_reduction: 1 - (mean ratio)^2, as the paper counts; 1 - mean ratio where only keys are restricted.
        attn_flops_reduction_exact: 1 - mean of the squares; the same where only keys are restricted.
        captured_mass: Share of the probed attention that kept tokens hold.
        mass_per_layer: Likewise by layer.
        kv_bytes: Bytes of all that the cache stores now, 0 without a cache.
        kv_dense_bytes: 16 bits for every key and value of the tokens seen, in bytes; 0 without a cache.
        physical_lengths: Token slots a row of each layer, empty ones of uneven batches included; empty without a cache.
        skipped_reason: Why no layer left anything out, or None.
        kept: Columns of the input that take part, int64, by layer and row; not part of `to_dict`.
    """

    tokens: tuple[int, ...]
    token_ratio: float
    per_layer: tuple[float, ...]
    per_row: tuple[float, ...]
    visual_ratio: float | None
    visual_per_layer: tuple[float, ...] | None
    visual_per_row: tuple[float | None, ...] | None
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
    """The figures of the forward that ``state`` belongs to, and of the ``cache`` it filled.

    Raises:
        ValueError: If the forward has not reached a layer that may be sparse.
    """
    if not state.records:
        raise TersorError(
            "the forward met no layer that may be sparse; is the model run inside `with method.on(model):`?"
        )
    layers = len(layer_types(config.get_text_config(decoder=True)))
    some = next(iter(state.records.values()))
    prompt = [own.nonzero()[:, 0] for own in some.prompt.cpu()]
    rows = [row for row, own in enumerate(prompt) if len(own)]
    kept = [record.kept.rows() if (record := state.records.get(index)) else prompt for index in range(layers)]
    ratio = torch.tensor([[_share(own[row], prompt[row]) for row in rows] for own in kept], dtype=torch.float64)
    visual, by_row = None, dict[int, float]()
    if state.visual is not None:
        flags = state.visual.cpu()
        seen = [row for row in rows if bool(flags[row, prompt[row]].any())]
        shares = [
            [_share(own[row][flags[row, own[row]]], prompt[row][flags[row, prompt[row]]]) for row in seen]
            for own in kept
        ]
        if seen:
            visual = torch.tensor(shares, dtype=torch.float64)
            by_row = dict(zip(seen, visual.mean(0).tolist(), strict=True))
    mass = [float(r.mass[rows].mean()) if (r := state.records.get(index)) else 1.0 for index in range(layers)]
    mean = float(ratio.mean())
    operations = state.choices.prefill.operations
    reasons = {record.skipped for record in state.records.values()}
    return SparsityStats(
        tokens=tuple(map(len, prompt)),
        token_ratio=mean,
        per_layer=tuple(ratio.mean(1).tolist()),
        per_row=tuple(ratio.mean(0).tolist()),
        visual_ratio=None if visual is None else float(visual.mean()),
        visual_per_layer=None if visual is None else tuple(visual.mean(1).tolist()),
        visual_per_row=None if visual is None else tuple(by_row.get(row) for row in rows),
        attn_flops_reduction=1 - operations(mean),
        attn_flops_reduction_exact=1 - float(operations(ratio).mean()),
        captured_mass=sum(mass) / layers,
        mass_per_layer=tuple(mass),
        kv_bytes=0 if cache is None else _stored(cache),
        kv_dense_bytes=0 if cache is None else _dense(cache),
        physical_lengths=() if cache is None else tuple(_physical(layer) for layer in cache.layers),
        skipped_reason=None if None in reasons else " and ".join(sorted(map(str, reasons))),
        kept=tuple(tuple(own) for own in kept),
    )


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

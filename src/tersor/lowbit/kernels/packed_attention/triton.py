"""Packed attention on a GPU: all parts of one kind in splits of their tokens, then one merge (split-token decoding).

The algebra is that of the reference: steps go into the query and the weights, minima become one scalar. A program
reads one split of one part for one KV head. Half-split packing shows in the shape of the products: the bytes of a tile
hold its codes in slots of neighbouring channels, so a 4-bit tile takes two products and a 2-bit tile four, each with
the query's channels of that slot, and nothing is interleaved or written back. Three-bit codes lie in two planes with
different slots; they are put together as they are loaded, in the order of the channels, and take one product.

However many segments a cache has, a call launches one kernel for each width, one for the window, and the merge: where
the parts of a width lie is a table of addresses on the device, written once for a `PartTable`.

float64 queries are computed by the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.lowbit.codes import AffineCodes
from tersor.lowbit.kernels import mask_strides
from tersor.lowbit.kernels.packed_attention import PackedPart, Part, PartTable, Window, reference
from tersor.lowbit.kernels.packed_attention.triton_kernels import ADDRESSES, _attend, _merge

RAW_BITS = 16
#: Tokens of a split are a multiple of this, the largest block that is tried.
SPLIT_UNIT = 128
#: Rows (query heads of a group times queries) that one program holds in registers.
MAX_ROWS = 64
#: `tl.dot` takes no side shorter than this.
MIN_DOT = 16


def packed_attention(
    query: Tensor,
    parts: Sequence[Part],
    window: Window | None = None,
    *,
    scaling: float,
    mask: Tensor | None = None,
    score_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.packed_attention`; output and log-sum-exp are float32.

    Raises:
        ValueError: without any part that holds tokens.
    """
    parts = parts if isinstance(parts, PartTable) else PartTable(parts)
    window = window if window is not None and window.tokens else None
    if not (parts or window) or query.dtype == torch.float64:
        return reference.packed_attention(query, parts, window, scaling=scaling, mask=mask, score_bias=score_bias)
    batch, heads, queries, _ = query.shape
    first: Any = parts[0] if parts else window
    kv_heads, value_dim = first.kv_heads, first.value_dim
    rows = heads // kv_heads * queries
    block_rows = min(MAX_ROWS, max(MIN_DOT, triton.next_power_of_2(rows)))
    programs = batch * kv_heads * triton.cdiv(rows, block_rows)
    launches = [*_launches(parts, programs, query.device), *([] if window is None else [_of_window(window)])]
    places = sum(each.splits for each in launches)
    peak = query.new_empty(places, batch, heads, queries, dtype=torch.float32)
    total = torch.empty_like(peak)
    partial = query.new_empty(places, batch, heads, queries, value_dim, dtype=torch.float32)
    query = query.contiguous()
    strides = (0, 0, 0) if mask is None else mask_strides(mask)
    place = 0
    for each in launches:
        _attend[(programs, each.splits)](
            query=query,
            **each.arguments,
            valid_window=window.valid if window is not None and each.is_window and mask is None else None,
            score_bias=None if score_bias is None or each.is_window else score_bias.float().contiguous(),
            bias_width=0 if score_bias is None else score_bias.shape[-1],
            mask=mask,
            sequence=0 if mask is None else mask.shape[-1],
            **dict(zip(("mask_batch", "mask_query", "mask_token"), strides, strict=True)),
            peak=peak[place:],
            total=total[place:],
            output=partial[place:],
            scaling=scaling,
            rows=rows,
            queries=queries,
            kv_heads=kv_heads,
            all_rows=batch * heads * queries,
            BLOCK_ROWS=block_rows,
            # Codes are exact in TF32; three products keep a float32 query exact as well.
            PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
        )
        place += each.splits
    output, lse = torch.empty_like(partial[0]), torch.empty_like(peak[0])
    _merge[(lse.numel(),)](
        peak,
        total,
        partial,
        output,
        lse,
        places,
        lse.numel(),
        VALUE_DIM=value_dim,
        BLOCK_VALUE=triton.next_power_of_2(value_dim),
    )
    return output, lse


@dataclass
class _Launch:
    """One launch: a number of splits, and the arguments that do not change from call to call."""

    splits: int
    arguments: dict[str, Any]
    is_window: bool = False
    alive: Any = None


def _launches(parts: PartTable, programs: int, device: torch.device) -> list[_Launch]:
    """A launch for each kind of part; kept with the table."""
    key = f"triton, {programs} programs"
    if key not in parts.kept:
        kinds: dict[tuple[Any, ...], list[Part]] = {}
        for part in parts:
            kinds.setdefault(tuple(_kind(part).items()), []).append(part)
        parts.kept[key] = [_launch(alike, programs, device) for alike in kinds.values()]
    launches: list[_Launch] = parts.kept[key]
    return launches


def _launch(alike: list[Part], programs: int, device: torch.device) -> _Launch:
    """The table of parts of one kind, and their splits: at least two programs a processor where there are many."""
    units = sum(triton.cdiv(part.tokens, SPLIT_UNIT) for part in alike)
    wanted = triton.cdiv(2 * _processors(device), programs)
    split_tokens = triton.cdiv(units, min(wanted, units)) * SPLIT_UNIT
    splits = [(row, at) for row, part in enumerate(alike) for at in range(0, part.tokens, split_tokens)]
    tensors = [_tensors(part) for part in alike]
    rows = [
        [*(0 if (tensor := own[name]) is None else tensor.data_ptr() for name in ADDRESSES), *_numbers(part, own)]
        for part, own in zip(alike, tensors, strict=True)
    ]
    table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
    places = torch.tensor(splits, dtype=torch.int32).to(device, non_blocking=True)
    arguments = {"table": table, "splits": places, "split_tokens": split_tokens, **_NO_WINDOW, **_kind(alike[0])}
    return _Launch(len(splits), arguments, alive=tensors)


#: What a launch over stored parts says in the place of the window.
_NO_WINDOW = {"window_keys": None, "window_values": None, "window_tokens": 0, "window_slots": 0}


def _of_window(window: Window) -> _Launch:
    tokens = window.tokens
    arguments = {
        "table": None,
        "splits": None,
        "split_tokens": SPLIT_UNIT,
        "window_keys": window.keys,
        "window_values": window.values,
        "window_tokens": tokens,
        "window_slots": window.keys.shape[2],
        **_shape("KEY", window.keys),
        **_shape("VALUE", window.values),
        **dict.fromkeys(_TYPES, None),
        "POSITIONS": False,
        "VALID": False,
    }
    return _Launch(triton.cdiv(tokens, SPLIT_UNIT), arguments, is_window=True)


def _tensors(part: Part) -> dict[str, Tensor | None]:
    """What the kernel reads of a part, contiguous."""
    found: dict[str, Tensor | None] = dict.fromkeys(ADDRESSES)
    if isinstance(part, PackedPart):
        found |= {
            "keys": part.keys.codes, "values": part.values.codes, "key_step": part.keys.step,
            "key_minimum": part.keys.minimum, "value_step": part.values.step, "value_minimum": part.values.minimum,
            "channel_scale": part.channel_scale,
        }  # fmt: skip
    else:
        found |= {"keys": part.keys, "values": part.values}
    found |= {name: getattr(part, name) for name in ("key_factor", "value_factor", "positions", "valid")}
    return {name: None if tensor is None else tensor.contiguous() for name, tensor in found.items()}


def _numbers(part: Part, tensors: dict[str, Tensor | None]) -> list[int]:
    of = ("value_step", "key_factor", "value_factor", "positions", "valid")
    return [part.tokens, *(0 if (tensor := tensors[name]) is None else tensor.shape[1] for name in of)]


#: Names of the precisions that a kind of part has of its own.
_TYPES = tuple(
    f"{name.upper()}_TYPE"
    for name in (
        *("keys", "values", "key_step", "key_minimum", "value_step", "value_minimum", "channel_scale"),
        *("key_factor", "value_factor"),
    )
)
_PRECISIONS = {
    torch.uint8: tl.uint8, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16,
    torch.float64: tl.float64,
}  # fmt: skip


def _kind(part: Part) -> dict[str, Any]:
    """What parts must have in common to be read by one launch, as the kernel's constants."""
    tensors = _tensors(part)
    types = {name: tensors[name.removesuffix("_TYPE").lower()] for name in _TYPES}
    return {
        **_shape("KEY", part.keys),
        **_shape("VALUE", part.values),
        **{name: None if tensor is None else _PRECISIONS[tensor.dtype] for name, tensor in types.items()},
        "POSITIONS": part.positions is not None,
        "VALID": part.valid is not None,
    }


def _shape(name: str, stored: AffineCodes | Tensor) -> dict[str, int]:
    """Bits of a code, channels, bytes (or numbers) of a row, channels that lie side by side, the block for those."""
    if isinstance(stored, Tensor):
        bits, dim, width = RAW_BITS, stored.shape[-1], stored.shape[-1]
    else:
        bits, dim, width = stored.bits, stored.dim, stored.codes.shape[-1]
    beside = dim if bits == 3 else width
    block = max(MIN_DOT, triton.next_power_of_2(beside))
    return {
        f"{name}_BITS": bits, f"{name}_DIM": dim, f"{name}_BYTES": width, f"{name}_WIDTH": beside,
        f"BLOCK_{name}": block,
    }  # fmt: skip


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 16  # the interpreter: enough that long parts of a test meet several splits
    return torch.cuda.get_device_properties(device).multi_processor_count

"""Packed attention on a CPU, in C with threads: see cpu.c for how it works.

What the C code does not do goes to the reference, which is as right and slower: float64, rows longer than 512, and more
query rows than are worth unpacking for (a long chunk of a prompt is better served by a matrix product).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tersor.lowbit.kernels import mask_strides
from tersor.lowbit.kernels._build import FLOAT_TYPES, load_library
from tersor.lowbit.kernels.packed_attention import PackedPart, Part, PartTable, Window, reference

MAX_DIM = 512
MAX_QUERY_ROWS = 64

_Pointer, _Long, _Int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Part(ctypes.Structure):
    _fields_ = (
        *((name, _Long) for name in ("tokens", "slots", "key_width", "value_width")),
        *((f"{name}_heads", _Long) for name in ("value_param", "key_factor", "value_factor", "position", "valid")),
        *((name, _Pointer) for name in ("keys", "values", "key_min", "key_step", "value_min", "value_step", "scale")),
        *((name, _Pointer) for name in ("key_factor", "value_factor", "positions", "valid")),
        *((name, _Int) for name in ("key_bits", "value_bits", "raw_type")),
        *((f"{name}_type", _Int) for name in ("key_min", "key_step", "value_min", "value_step", "scale")),
        *((f"{name}_type", _Int) for name in ("key_factor", "value_factor")),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Long) for name in ("batch", "kv_heads", "group", "queries", "key_dim", "value_dim")),
        *((name, _Long) for name in ("parts", "splits", "threads", "sequence")),
        ("mask_stride", _Long * 3),
        ("bias_width", _Long),
        *((name, _Pointer) for name in ("query", "part", "window", "mask", "score_bias")),
        *((name, _Pointer) for name in ("workspace", "output", "lse")),
    )


@cache
def _function() -> Callable[[ctypes.Structure], None]:
    library = load_library(Path(__file__).with_name("cpu.c"))
    library.packed_attention.argtypes = [ctypes.POINTER(_Call)]
    library.packed_attention.restype = None
    function: Callable[[ctypes.Structure], None] = library.packed_attention
    return function


def check_available() -> None:
    """Build or find the C library; raises `NoCompilerError` where that is not possible."""
    _function()


def packed_attention(
    query: Tensor,
    parts: Sequence[Part],
    window: Window | None = None,
    *,
    scaling: float,
    mask: Tensor | None = None,
    score_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of the parts; arguments, results and errors are those of the reference."""
    batch, heads, queries, dim = query.shape
    table = _described(parts)
    window = window if window is not None and window.tokens else None
    first: Part | Window | None = table.parts[0] if table.parts else window
    if first is None or not _supported(query, first, table, window):
        return reference.packed_attention(query, parts, window, scaling=scaling, mask=mask, score_bias=score_bias)
    kv_heads, value_dim = first.kv_heads, first.value_dim
    rows = heads // kv_heads * queries
    scaled = (query.float() if query.dtype != torch.float32 else query) * scaling
    output = torch.empty(batch, heads, queries, value_dim)
    lse = torch.empty(batch, heads, queries)
    threads = torch.get_num_threads()
    # Heads alone keep the threads busy where there are several for each; otherwise tokens are split as well.
    splits = 1 if batch * kv_heads >= 2 * threads else -(-2 * threads // (batch * kv_heads))
    workspace = _workspace(batch * kv_heads * splits * rows * (value_dim + 2))
    alive: list[Tensor] = []  # what the structures point to
    call = _Call(
        batch=batch, kv_heads=kv_heads, group=heads // kv_heads, queries=queries, key_dim=dim, value_dim=value_dim,
        parts=len(table.parts), splits=splits, threads=threads, query=_contiguous(scaled, alive),
        part=ctypes.addressof(table.structures), workspace=workspace.data_ptr(), output=output.data_ptr(),
        lse=lse.data_ptr(),
    )  # fmt: skip
    newest = None if window is None else _describe_window(window, mask)
    if newest is not None:
        call.window = ctypes.addressof(newest)
    if mask is not None:
        call.mask, call.sequence = mask.data_ptr(), mask.shape[-1]
        call.mask_stride[:] = mask_strides(mask)
    if score_bias is not None:
        call.score_bias, call.bias_width = _contiguous(score_bias.float(), alive), score_bias.shape[-1]
    _function()(call)
    return output, lse


@dataclass
class _Table:
    """The C structures of some parts, and what they are made of."""

    parts: list[Part]
    structures: ctypes.Array[_Part]
    alive: list[Tensor]
    readable: bool


def _described(parts: Sequence[Part]) -> _Table:
    """The C structures of the parts, which a `PartTable` keeps from call to call."""
    kept = parts.kept if isinstance(parts, PartTable) else {}
    if "cpu" not in kept:
        own = [part for part in parts if part.tokens]
        alive: list[Tensor] = []
        readable = all(map(_readable, own))
        structures = (_Part * len(own))(*(_describe(part, alive) for part in own if readable))
        kept["cpu"] = _Table(own, structures, alive, readable)
    table: _Table = kept["cpu"]
    return table


def _readable(part: Part) -> bool:
    stored = part.keys.minimum.dtype if isinstance(part, PackedPart) else part.keys.dtype
    return part.value_dim <= MAX_DIM and stored in FLOAT_TYPES


def _supported(query: Tensor, first: Part | Window, table: _Table, window: Window | None) -> bool:
    rows = query.shape[1] * query.shape[2]
    if query.dtype not in FLOAT_TYPES or query.shape[-1] > MAX_DIM or rows // first.kv_heads > MAX_QUERY_ROWS:
        return False
    return table.readable and (window is None or (window.value_dim <= MAX_DIM and window.keys.dtype in FLOAT_TYPES))


def _describe(part: Part, alive: list[Tensor]) -> _Part:
    """The C structure of one part; tensors that had to be copied to be contiguous go to ``alive``."""
    c = _Part(tokens=part.tokens, slots=part.tokens)
    if isinstance(part, PackedPart):
        keys, values = part.keys, part.values
        c.key_bits, c.value_bits = keys.bits, values.bits
        c.key_width, c.value_width = keys.codes.shape[-1], values.codes.shape[-1]
        c.value_param_heads = values.step.shape[1]
        c.keys, c.values = _contiguous(keys.codes, alive), _contiguous(values.codes, alive)
        for name, tensor in (
            ("key_min", keys.minimum), ("key_step", keys.step), ("value_min", values.minimum),
            ("value_step", values.step), ("scale", part.channel_scale),
        ):  # fmt: skip
            setattr(c, name, _contiguous(tensor, alive))
            setattr(c, f"{name}_type", FLOAT_TYPES[tensor.dtype])
    else:
        c.key_width, c.value_width = part.keys.shape[-1], part.values.shape[-1]
        c.keys, c.values = _contiguous(part.keys, alive), _contiguous(part.values, alive)
        c.raw_type = FLOAT_TYPES[part.keys.dtype]
    for name, factor in (("key_factor", part.key_factor), ("value_factor", part.value_factor)):
        if factor is not None:
            setattr(c, name, _contiguous(factor, alive))
            setattr(c, f"{name}_heads", factor.shape[1])
            setattr(c, f"{name}_type", FLOAT_TYPES[factor.dtype])
    if part.positions is not None:
        c.positions, c.position_heads = _contiguous(part.positions, alive), part.positions.shape[1]
    if part.valid is not None:
        c.valid, c.valid_heads = _contiguous(part.valid, alive), part.valid.shape[1]
    return c


def _describe_window(window: Window, mask: Tensor | None) -> _Part:
    c = _Part(
        tokens=window.tokens, slots=window.keys.shape[2], key_width=window.keys.shape[-1],
        value_width=window.value_dim, keys=window.keys.data_ptr(), values=window.values.data_ptr(),
        raw_type=FLOAT_TYPES[window.keys.dtype],
    )  # fmt: skip
    if window.valid is not None and mask is None:
        c.valid, c.valid_heads = window.valid.data_ptr(), 1
    return c


def _contiguous(tensor: Tensor, alive: list[Tensor]) -> int:
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    alive.append(tensor)
    return tensor.data_ptr()


_local = threading.local()


def _workspace(numbers: int) -> Tensor:
    """Scratch memory of this thread, kept from step to step."""
    held: Tensor | None = getattr(_local, "workspace", None)
    if held is None or held.numel() < numbers:
        held = _local.workspace = torch.empty(numbers)
    return held

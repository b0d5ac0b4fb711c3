"""Packed attention on a CPU, in C with threads: see cpu.c for how it works.

What the C code does not do goes to the reference, which is as right and slower: float64, rows longer than 512, and more
query rows than are worth unpacking for (a long chunk of a prompt is better served by a matrix product).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tersor.lowbit.codes import AffineCodes
from tersor.lowbit.kernels._build import FLOAT_TYPES, load_library
from tersor.lowbit.kernels.packed_attention import PackedPart, Part, reference

MAX_DIM = 512
MAX_QUERY_ROWS = 64

_Pointer, _Long, _Int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Part(ctypes.Structure):
    _fields_ = (
        *((name, _Long) for name in ("tokens", "key_width", "value_width")),
        *((name, _Long) for name in ("value_param_heads", "key_factor_heads", "value_factor_heads")),
        ("mask_stride", _Long * 4),
        *((name, _Pointer) for name in ("keys", "values", "key_min", "key_step", "value_min", "value_step", "scale")),
        *((name, _Pointer) for name in ("key_factor", "value_factor", "score_bias", "mask")),
        *((name, _Int) for name in ("key_bits", "value_bits", "raw_type")),
        *((f"{name}_type", _Int) for name in ("key_min", "key_step", "value_min", "value_step", "scale")),
        *((f"{name}_type", _Int) for name in ("key_factor", "value_factor")),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Long) for name in ("batch", "kv_heads", "group", "queries", "key_dim", "value_dim")),
        *((name, _Long) for name in ("parts", "splits", "threads")),
        *((name, _Pointer) for name in ("query", "part", "workspace", "output", "lse")),
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


def packed_attention(query: Tensor, parts: Sequence[Part], *, scaling: float) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of ``parts``; arguments, results and errors are those of the reference."""
    batch, heads, queries, dim = query.shape
    parts = [part for part in parts if _tokens(part)]
    if not parts or not _supported(query, parts):
        return reference.packed_attention(query, parts, scaling=scaling)
    first = parts[0]
    kv_heads = first.keys.codes.shape[1] if isinstance(first, PackedPart) else first.keys.shape[1]
    rows = heads // kv_heads * queries
    value_dim = first.values.dim if isinstance(first.values, AffineCodes) else first.values.shape[-1]
    scaled = query.float().mul_(scaling) if query.dtype != torch.float32 else query * scaling
    output = torch.empty(batch, heads, queries, value_dim)
    lse = torch.empty(batch, heads, queries)
    threads = torch.get_num_threads()
    # Heads alone keep the threads busy where there are several for each; otherwise tokens are split as well.
    splits = 1 if batch * kv_heads >= 2 * threads else -(-2 * threads // (batch * kv_heads))
    workspace = _workspace(batch * kv_heads * splits * rows * (value_dim + 2))
    alive: list[Tensor] = [scaled]  # what the structures point to
    table = (_Part * len(parts))(*(_describe(part, alive) for part in parts))
    call = _Call(
        batch=batch, kv_heads=kv_heads, group=heads // kv_heads, queries=queries, key_dim=dim, value_dim=value_dim,
        parts=len(parts), splits=splits, threads=threads, query=_contiguous(scaled, alive),
        part=ctypes.cast(table, _Pointer), workspace=workspace.data_ptr(), output=output.data_ptr(),
        lse=lse.data_ptr(),
    )  # fmt: skip
    _function()(call)
    return output, lse


def _tokens(part: Part) -> int:
    return int(part.keys.codes.shape[2] if isinstance(part, PackedPart) else part.keys.shape[2])


def _supported(query: Tensor, parts: Sequence[Part]) -> bool:
    rows = query.shape[1] * query.shape[2]
    if query.dtype not in FLOAT_TYPES or query.shape[-1] > MAX_DIM:
        return False
    for part in parts:
        if isinstance(part, PackedPart):
            kv_heads, value_dim, stored = part.keys.codes.shape[1], part.values.dim, part.keys.minimum.dtype
        else:
            kv_heads, value_dim, stored = part.keys.shape[1], part.values.shape[-1], part.keys.dtype
        if value_dim > MAX_DIM or stored not in FLOAT_TYPES or rows // kv_heads > MAX_QUERY_ROWS:
            return False
    return True


def _describe(part: Part, alive: list[Tensor]) -> _Part:
    """The C structure of one part; tensors that had to be copied to be contiguous go to ``alive``."""
    c = _Part(tokens=_tokens(part))
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
        if part.score_bias is not None:
            alive.append(part.score_bias.float())
            c.score_bias = _contiguous(alive[-1], alive)
    else:
        c.key_width, c.value_width = part.keys.shape[-1], part.values.shape[-1]
        c.keys, c.values = _contiguous(part.keys, alive), _contiguous(part.values, alive)
        c.raw_type = FLOAT_TYPES[part.keys.dtype]
    for name, factor in (("key_factor", part.key_factor), ("value_factor", part.value_factor)):
        if factor is not None:
            setattr(c, name, _contiguous(factor, alive))
            setattr(c, f"{name}_heads", factor.shape[1])
            setattr(c, f"{name}_type", FLOAT_TYPES[factor.dtype])
    if part.mask is not None:
        c.mask = part.mask.data_ptr()
        c.mask_stride[:] = [0 if n == 1 else step for n, step in zip(part.mask.shape, part.mask.stride(), strict=True)]
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

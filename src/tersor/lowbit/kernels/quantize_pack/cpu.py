"""Quantizing and packing on a CPU, in C with threads: one pass over the numbers and no tensor of codes between."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tersor.lowbit.kernels._build import FLOAT_TYPES, load_library
from tersor.lowbit.kernels.quantize_pack import reference
from tersor.lowbit.packing import check_bits, packed_width

MAX_DIM = 512


class _Tensor(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4), ("type", ctypes.c_int32))


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "tokens", "dim", "width", "threads")),
        *((name, _Tensor) for name in ("x", "minimum", "step", "scale")),
        ("packed", ctypes.c_void_p),
        ("bits", ctypes.c_int32),
    )


@cache
def _function() -> Callable[[ctypes.Structure], None]:
    library = load_library(Path(__file__).with_name("cpu.c"), "-ffp-contract=off")
    library.quantize_pack.argtypes = [ctypes.POINTER(_Call)]
    library.quantize_pack.restype = None
    function: Callable[[ctypes.Structure], None] = library.quantize_pack
    return function


def check_available() -> None:
    """Build or find the C library; raises `NoCompilerError` where that is not possible."""
    _function()


def quantize_pack(x: Tensor, minimum: Tensor, step: Tensor, bits: int, channel_scale: Tensor | None = None) -> Tensor:
    """As `reference.quantize_pack`, byte for byte; float64 and rows longer than 512 are left to the reference."""
    check_bits(bits)
    given = [x, minimum, step] if channel_scale is None else [x, minimum, step, channel_scale]
    if any(tensor.dtype not in FLOAT_TYPES for tensor in given) or x.shape[-1] > MAX_DIM:
        return reference.quantize_pack(x, minimum, step, bits, channel_scale)
    batch, heads, tokens, dim = x.shape
    packed = torch.empty(batch, heads, tokens, packed_width(dim, bits), dtype=torch.uint8)
    call = _Call(
        batch=batch, heads=heads, tokens=tokens, dim=dim, width=packed.shape[-1], threads=torch.get_num_threads(),
        x=_describe(x, x), minimum=_describe(minimum, x), step=_describe(step, x), packed=packed.data_ptr(), bits=bits,
    )  # fmt: skip
    if channel_scale is not None:
        call.scale = _describe(channel_scale, x)
    _function()(call)
    return packed


def _describe(tensor: Tensor, like: Tensor) -> _Tensor:
    wide = tensor.expand(like.shape)
    return _Tensor(wide.data_ptr(), (ctypes.c_int64 * 4)(*wide.stride()), FLOAT_TYPES[tensor.dtype])

"""Window scores on a CPU, in C."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tersor.lowbit.kernels import mask_strides
from tersor.lowbit.kernels._build import FLOAT_TYPES, load_library
from tersor.lowbit.kernels.window_scores import reference

MAX_DIM = 512

_Pointer, _Long, _Int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Long) for name in ("batch", "kv_heads", "group", "queries", "dim", "slots", "tokens", "rows")),
        *((name, _Long) for name in ("scopes", "places", "sequence")),
        ("query_stride", _Long * 3),
        ("mask_stride", _Long * 3),
        *((name, _Pointer) for name in ("query", "keys", "lse", "steps", "place", "mask")),
        ("scaling", ctypes.c_double),
        *((name, _Int) for name in ("query_type", "key_type")),
    )


@cache
def _function() -> Callable[[ctypes.Structure], None]:
    library = load_library(Path(__file__).with_name("cpu.c"))
    library.window_scores.argtypes = [ctypes.POINTER(_Call)]
    library.window_scores.restype = None
    function: Callable[[ctypes.Structure], None] = library.window_scores
    return function


def check_available() -> None:
    """Build or find the C library; raises `NoCompilerError` where that is not possible."""
    _function()


def window_scores(
    query: Tensor,
    keys: Tensor,
    lse: Tensor,
    steps: Tensor,
    places: Sequence[tuple[int, int, int]],
    *,
    tokens: int,
    scaling: float,
    mask: Tensor | None = None,
) -> None:
    """As `reference.window_scores`; float64 and rows longer than 512 are left to the reference."""
    batch, heads, queries, dim = query.shape
    readable = query.dtype in FLOAT_TYPES and keys.dtype in FLOAT_TYPES and lse.dtype == torch.float32
    if not readable or dim > MAX_DIM or query.stride(-1) != 1:
        reference.window_scores(query, keys, lse, steps, places, tokens=tokens, scaling=scaling, mask=mask)
        return
    table = (_Long * (3 * len(places)))(*(number for place in places for number in place))
    call = _Call(
        batch=batch, kv_heads=keys.shape[1], group=heads // keys.shape[1], queries=queries, dim=dim,
        slots=keys.shape[2], tokens=tokens, rows=steps.shape[1], scopes=steps.shape[2] - 1, places=len(places),
        query=query.data_ptr(), keys=keys.data_ptr(), lse=lse.data_ptr(), steps=steps.data_ptr(),
        place=ctypes.addressof(table), scaling=scaling, query_type=FLOAT_TYPES[query.dtype],
        key_type=FLOAT_TYPES[keys.dtype],
    )  # fmt: skip
    call.query_stride[:] = query.stride()[:3]
    if mask is not None:
        call.mask, call.sequence = mask.data_ptr(), mask.shape[-1]
        call.mask_stride[:] = mask_strides(mask)
    _function()(call)

"""Probe sums on a CPU, in C with threads: see cpu.c for how it works."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tersor.lowbit.kernels import mask_strides
from tersor.lowbit.kernels._build import FLOAT_TYPES, load_library
from tersor.lowbit.kernels.probe_sums import has_gradient, reference

#: As in cpu.c: channels of a head, and upper bounds of the columns of a panel and of the rows of a block.
MAX_DIM, PANEL, BLOCK = 512, 32, 48

_Pointer, _Long, _Int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Long) for name in ("batch", "kv_heads", "group", "added", "dim", "columns", "rows", "chunks")),
        ("threads", _Long),
        *((name, _Long * 3) for name in ("query_stride", "key_stride", "lse_stride", "mask_stride")),
        *((name, _Pointer) for name in ("query", "keys", "row", "lse", "mask", "scratch", "sums")),
        ("scaling", ctypes.c_double),
        *((name, _Int) for name in ("query_type", "key_type")),
    )


@cache
def _function() -> Callable[[ctypes.Structure], None]:
    library = load_library(Path(__file__).with_name("cpu.c"))
    library.probe_sums.argtypes = [ctypes.POINTER(_Call)]
    library.probe_sums.restype = None
    function: Callable[[ctypes.Structure], None] = library.probe_sums
    return function


def check_available() -> None:
    """Build or find the C library; raises `NoCompilerError` where that is not possible."""
    _function()


def probe_sums(
    query: Tensor,
    keys: Tensor,
    rows: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    lse: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """As `reference.probe_sums`, which does float64, soft caps, gradients and heads of more than 512 channels."""
    batch, heads, added, dim = query.shape
    kv_heads, columns = keys.shape[1:3]
    readable = query.dtype in FLOAT_TYPES and keys.dtype in FLOAT_TYPES and dim <= MAX_DIM
    together = query.stride(-1) == keys.stride(-1) == 1 and (lse is None or lse.dtype == torch.float32)
    if not readable or not together or softcap is not None or has_gradient(query, keys):
        return reference.probe_sums(query, keys, rows, scaling=scaling, softcap=softcap, lse=lse, allowed=allowed)
    threads = torch.get_num_threads()
    # Heads alone keep the threads busy where there are enough of them; otherwise each head's rows are split as well.
    chunks = 1 if batch * kv_heads >= 2 * threads else -(-2 * threads // (batch * kv_heads))
    scratch = query.new_empty(threads * (dim + BLOCK) * (columns + PANEL), dtype=torch.float32)
    sums = query.new_zeros(batch, kv_heads, chunks, columns, dtype=torch.float32)
    call = _Call(
        batch=batch, kv_heads=kv_heads, group=heads // kv_heads, added=added, dim=dim, columns=columns,
        rows=len(rows), chunks=chunks, threads=threads, query=query.data_ptr(), keys=keys.data_ptr(),
        row=rows.data_ptr(), scratch=scratch.data_ptr(), sums=sums.data_ptr(), scaling=scaling,
        query_type=FLOAT_TYPES[query.dtype], key_type=FLOAT_TYPES[keys.dtype],
    )  # fmt: skip
    call.query_stride[:], call.key_stride[:] = query.stride()[:3], keys.stride()[:3]
    if lse is not None:
        call.lse = lse.data_ptr()
        call.lse_stride[:] = lse.stride()
    if allowed is not None:
        call.mask = allowed.data_ptr()
        call.mask_stride[:] = mask_strides(allowed[:, None])
    _function()(call)
    return sums.sum(2) if chunks > 1 else sums[:, :, 0]

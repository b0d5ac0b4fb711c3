"""Products with packed deltas on a CPU, in C with threads: see cpu.c for how it works."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tersor.lowbit.kernels._build import FLOAT_TYPES, load_library
from tersor.lowbit.kernels.delta_linear import DeltaGroup, PackedDelta, check_delta_linear, reference

MAX_ROWS = 8

_Pointer, _Long, _Int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Delta(ctypes.Structure):
    _fields_ = (
        *((name, _Pointer) for name in ("codes", "step", "index", "weight")),
        *((name, _Long) for name in ("width", "salient")),
        ("zero", ctypes.c_float),
        *((name, _Int) for name in ("bits", "step_type", "weight_type")),
    )


class _Group(ctypes.Structure):
    _fields_ = (("delta", ctypes.POINTER(_Delta)), ("row", _Pointer), ("rows", _Long), ("block", _Long))


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Pointer) for name in ("x", "y", "group", "spread", "picked")),
        *((name, _Long) for name in ("in_", "out", "groups", "blocks", "stride", "most_salient", "threads")),
        *((name, _Int) for name in ("x_type", "y_type")),
    )


@cache
def _library() -> tuple[Callable[[ctypes.Structure], None], Callable[[ctypes.Structure, int], int]]:
    library = load_library(Path(__file__).with_name("cpu.c"))
    library.delta_linear.argtypes = [ctypes.POINTER(_Call)]
    library.delta_linear.restype = None
    library.delta_stride.argtypes = [ctypes.POINTER(_Delta), _Long]
    library.delta_stride.restype = _Long
    return library.delta_linear, library.delta_stride


def check_available() -> None:
    """Build or find the C library; raises `NoCompilerError` where that is not possible."""
    _library()


def delta_linear(x: Tensor, y: Tensor, groups: Sequence[DeltaGroup]) -> Tensor:
    """As `reference.delta_linear`, in place of ``y`` where that is contiguous; float64 is left to the reference.

    Not differentiable: where gradients are wanted, take the reference.
    """
    check_delta_linear(x, y, groups)
    if x.dtype not in FLOAT_TYPES or y.dtype not in FLOAT_TYPES or any(_wide(delta) for delta, _ in groups):
        return reference.delta_linear(x, y, groups)
    x, y = x.contiguous(), y.contiguous()
    described = [_describe(delta) for delta, _ in groups]
    rows = [None if rows is None else rows.contiguous() for _, rows in groups]
    table = (_Group * len(groups))()
    blocks = 0
    for entry, (delta, _), own in zip(table, described, rows, strict=True):
        entry.delta = ctypes.pointer(delta)
        entry.row = None if own is None else own.data_ptr()
        entry.rows = len(x) if own is None else len(own)
        entry.block = blocks
        blocks += -(-entry.rows // MAX_ROWS)
    if not blocks:
        return y
    stride = max(stride for _, stride in described)
    most_salient = max(delta.salient for delta, _ in described)
    spread, picked = _workspace(blocks * MAX_ROWS * stride, blocks * MAX_ROWS * most_salient)
    call = _Call(
        x=x.data_ptr(), y=y.data_ptr(), group=ctypes.cast(table, _Pointer), spread=spread, picked=picked,
        in_=x.shape[1], out=y.shape[1], groups=len(groups), blocks=blocks, stride=stride, most_salient=most_salient,
        threads=torch.get_num_threads(), x_type=FLOAT_TYPES[x.dtype], y_type=FLOAT_TYPES[y.dtype],
    )  # fmt: skip
    _library()[0](call)
    return y


def _wide(delta: PackedDelta) -> bool:
    return delta.step.dtype not in FLOAT_TYPES or delta.salient_weight.dtype not in FLOAT_TYPES


_described: WeakKeyDictionary[PackedDelta, tuple[_Delta, int]] = WeakKeyDictionary()


def _describe(delta: PackedDelta) -> tuple[_Delta, int]:
    """The C structure of a delta and the numbers that one row of inputs takes for it; made once, since decoding asks
    for it at every token.
    """
    known = _described.get(delta)
    if known is None:
        codes, step, index, weight = delta.tensors
        c = _Delta(
            codes=codes.data_ptr(), step=step.data_ptr(), index=index.data_ptr(), weight=weight.data_ptr(),
            width=codes.shape[1], salient=index.numel(), zero=delta.zero, bits=delta.bits,
            step_type=FLOAT_TYPES[step.dtype], weight_type=FLOAT_TYPES[weight.dtype],
        )  # fmt: skip
        known = _described[delta] = (c, _library()[1](c, delta.dim))
    return known


_local = threading.local()


def _workspace(*numbers: int) -> list[int]:
    """Addresses of float32 scratch memory of this thread, kept from call to call, one for each count."""
    held: Tensor | None = getattr(_local, "workspace", None)
    if held is None or held.numel() < sum(numbers):
        held = _local.workspace = torch.empty(sum(numbers))
    start, addresses = held.data_ptr(), []
    for count in numbers:
        addresses.append(start)
        start += 4 * count
    return addresses

"""One registry of kernels: operation -> back end -> where its function lives.

Every operation has a ``reference`` in plain torch, which is its definition; faster back ends register here
and are picked by device. Tests and benchmarks walk the same table.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

#: Operation -> back end -> "module:function", fastest back end first. Modules load on first use.
KERNELS: dict[str, dict[str, str]] = {
    "packed_attention": {"reference": "tersor.lowbit.kernels.packed_attention.reference:packed_attention"},
}


def backends(operation: str) -> list[str]:
    """Names of the back ends that an operation has, the preferred one first."""
    if operation not in KERNELS:
        raise ValueError(f"operation {operation!r} has no kernel; choose one of {sorted(KERNELS)}")
    return list(KERNELS[operation])


def get_kernel(operation: str, backend: str | None = None) -> Callable[..., Any]:
    """The function of ``operation``; ``backend`` forces one, which tests and benchmarks do.

    Raises:
        ValueError: for an unknown operation or back end.
    """
    available = backends(operation)
    if backend is not None and backend not in available:
        raise ValueError(f"{operation} has no back end {backend!r}; choose one of {available}")
    module, _, name = KERNELS[operation][backend or available[0]].partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function

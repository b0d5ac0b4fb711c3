"""One registry of kernels: operation -> back end -> where its function lives.

Every operation has a ``reference`` in plain torch, which is its definition. Faster back ends stand before it: ``cpu``,
C that is built once on the user's machine, and ``triton`` for GPUs. The first one that runs on a tensor's device is
picked; one that cannot run here is passed over, and `tersor env` says why. Tests and benchmarks walk the same table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tersor._errors import TersorError

if TYPE_CHECKING:
    from torch import Tensor

#: Operation -> back end -> "module:function", fastest first and the reference last. Modules load on first use.
KERNELS: dict[str, dict[str, str]] = {
    operation: {
        backend: f"tersor.lowbit.kernels.{operation}.{backend}:{operation}"
        for backend in ("cpu", "triton", "reference")
    }
    for operation in ("packed_attention", "probe_sums", "window_scores", "quantize_pack", "delta_linear")
}


def backends(operation: str) -> list[str]:
    """Names of the back ends that an operation has, the preferred one first."""
    if operation not in KERNELS:
        raise TersorError(f"operation {operation!r} has no kernel; choose one of {sorted(KERNELS)}")
    return list(KERNELS[operation])


def get_kernel(operation: str, backend: str | None = None, *, device: str = "cpu") -> Callable[..., Any]:
    """The fastest function of ``operation`` that runs on tensors of ``device`` (its type: "cpu", "cuda", ...).

    ``backend`` forces one, which tests and benchmarks do.

    Raises:
        ValueError: If the operation or the back end is unknown.
    """
    available = backends(operation)
    if backend is not None and backend not in available:
        raise TersorError(f"{operation} has no back end {backend!r}; choose one of {available}")
    return _load(operation, backend or chosen_backend(operation, device))


def chosen_backend(operation: str, device: str = "cpu") -> str:
    """The back end that `get_kernel` picks on ``device``."""
    return next(name for name in backends(operation) if unavailable_reason(operation, name, device) is None)


@cache
def unavailable_reason(operation: str, backend: str, device: str = "cpu") -> str | None:
    """Why a back end does not serve tensors of ``device`` here, or None where it does."""
    if backend == "cpu":
        if device != "cpu":
            return f"tensors are on {device}"
        from tersor.lowbit.kernels._build import NoCompilerError

        try:
            _module(operation, backend).check_available()
        except NoCompilerError as error:
            return str(error)
    elif backend == "triton":
        from tersor.lowbit.kernels import triton_runtime

        if device != "cuda":
            return f"tensors are on {device}"
        if not triton_runtime.available(device):
            return "Triton is not installed"
    return None


def mask_strides(mask: Tensor) -> tuple[int, int, int]:
    """Steps of a mask ``[batch or 1, 1, queries or 1, sequence]`` by sample, query, column; 0 where broadcast."""
    sample, _, query, column = mask.stride()
    return 0 if mask.shape[0] == 1 else sample, 0 if mask.shape[2] == 1 else query, column


@cache
def _load(operation: str, backend: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(_module(operation, backend), KERNELS[operation][backend].partition(":")[2])
    return function


def _module(operation: str, backend: str) -> Any:
    return import_module(KERNELS[operation][backend].partition(":")[0])

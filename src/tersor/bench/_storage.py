"""How many bytes the tensors reachable from an object really hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Set
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

import torch

# Objects that own no tensors, or that lead out of what was asked about (a function leads to its globals).
_LEAVES = (
    str, bytes, bytearray, int, float, complex, type(None), type,
    ModuleType, FunctionType, BuiltinFunctionType, MethodType,
    torch.dtype, torch.device, torch.Generator,
)  # fmt: skip


def storage_bytes(obj: object) -> int:
    """Bytes of all distinct storages behind the tensors reachable from ``obj``.

    ``obj`` may be a tensor, a cache, a module, or any nesting of mappings, sequences, sets, dataclasses and
    plain objects. A storage counts once and whole, however many views point into it and however little of it
    they show: a slice that keeps a large tensor alive costs the large tensor. Subclasses that wrap tensors
    (quantized weights) count what they wrap. Tensors on the meta device count nothing, and gradients are not
    followed.
    """
    sizes: dict[tuple[torch.device, int], int] = {}
    seen: dict[int, object] = {}  # keeps each object alive, because the id of a freed one may be given again
    waiting = [obj]
    while waiting:
        current = waiting.pop()
        if id(current) in seen or isinstance(current, _LEAVES):
            continue
        seen[id(current)] = current
        if isinstance(current, torch.Tensor) and not _wraps_others(current):
            if not current.is_meta:
                storage = current.untyped_storage()
                sizes[current.device, storage.data_ptr()] = storage.nbytes()
            continue
        waiting.extend(_parts(current))
    return sum(sizes.values())


def _wraps_others(tensor: torch.Tensor) -> bool:
    # PyTorch's own protocol for subclasses without a storage of their own.
    return hasattr(tensor, "__tensor_flatten__")


def _parts(obj: object) -> Iterator[object]:
    if isinstance(obj, torch.Tensor):
        names, _ = obj.__tensor_flatten__()  # type: ignore[attr-defined]
        yield from (getattr(obj, name) for name in names)
        return
    if isinstance(obj, Mapping):
        yield from obj.keys()
        yield from obj.values()
    elif isinstance(obj, Set | list | tuple | deque):
        yield from obj
    yield from getattr(obj, "__dict__", {}).values()
    for owner in type(obj).__mro__:
        slots = owner.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(obj, name):
                yield getattr(obj, name)

"""Walk the tensors of nested dataclasses, lists and tuples: batch operations, moves and byte counts in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


def map_tensors(node: T, function: Callable[[Tensor], Tensor]) -> T:
    """Rebuild ``node`` with ``function`` applied to each tensor; a tensor held twice stays shared."""
    done: dict[int, Tensor] = {}

    def walk(item: Any) -> Any:
        if isinstance(item, Tensor):
            if id(item) not in done:
                done[id(item)] = function(item)
            return done[id(item)]
        if isinstance(item, list | tuple):
            return type(item)(map(walk, item))
        if is_dataclass(item) and not isinstance(item, type):
            return type(item)(**{field.name: walk(getattr(item, field.name)) for field in fields(item)})
        return item

    return walk(node)


def iter_tensors(node: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield ``(dotted path, tensor)`` for each tensor below ``node``."""
    if isinstance(node, Tensor):
        yield name, node
    elif isinstance(node, list | tuple):
        for index, entry in enumerate(node):
            yield from iter_tensors(entry, f"{name}.{index}" if name else str(index))
    elif is_dataclass(node) and not isinstance(node, type):
        for field in fields(node):
            yield from iter_tensors(getattr(node, field.name), f"{name}.{field.name}" if name else field.name)

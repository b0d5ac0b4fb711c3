"""What networks give: one tensor, or several in lists, tuples and mappings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Tensors of an output, in order: of lists, tuples and mappings, however they are nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)


def names_of(value: Any) -> list[str]:
    """A name for each tensor of an output: "logits" for a single one, keys of mappings, numbers of lists."""
    if isinstance(value, Tensor):
        return ["logits"]

    def below(part: Any, path: str) -> Iterator[str]:
        if isinstance(part, Tensor):
            yield path
        elif isinstance(part, dict | list | tuple):
            for key, each in part.items() if isinstance(part, dict) else enumerate(part):
                yield from below(each, f"{path}_{key}" if path else str(key))

    names = list(below(value, "" if isinstance(value, dict) else "output"))
    return [name if name != "input" else "output_input" for name in names]

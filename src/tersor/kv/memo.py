"""What was worked out from a tensor, kept with it: all layers of a forward get the same mask and positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")

#: Attribute under which a tensor keeps what is known of it: name -> (key and version, what was worked out).
_KNOWN = "_tersor_known"


def remembered(tensor: Tensor, name: str, key: Any, work_out: Callable[[], T]) -> T:
    """``work_out()``, or what it gave the last time for this ``tensor`` under ``name``.

    Args:
        tensor: What it is worked out from; a change in place forgets it.
        name: What it is.
        key: What else it depends on.
        work_out: Makes it.
    """
    state = _state(tensor, key)
    known: tuple[Any, T] | None = tensor.__dict__.get(_KNOWN, {}).get(name)
    if known is not None and known[0] == state:
        return known[1]
    result = work_out()
    remember(tensor, name, key, result)
    return result


def remember(tensor: Tensor, name: str, key: Any, result: Any) -> None:
    """Have `remembered` return ``result``, for what is as good as what it would work out."""
    tensor.__dict__.setdefault(_KNOWN, {})[name] = _state(tensor, key), result


def _state(tensor: Tensor, key: Any) -> tuple[Any, int]:
    return key, 0 if tensor.is_inference() else tensor._version

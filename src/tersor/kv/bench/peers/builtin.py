"""The library's own quantized caches: groups along the channels, the newest 128 tokens raw."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, QuantizedCache

from tersor._errors import TersorError
from tersor._lazy import require


def quanto_cache(config: PreTrainedConfig, *, bits: int, group_size: int) -> Cache:
    """`QuantizedCache` with optimum-quanto.

    Raises:
        MissingExtraError: Without it.
        TersorError: If a lock stands in the way of its kernels.
    """
    require("optimum.quanto", "bench")
    wait_for_locks(quanto_locks())
    return QuantizedCache("quanto", config, nbits=bits, q_group_size=group_size)


def hqq_cache(config: PreTrainedConfig, *, bits: int, group_size: int) -> Cache:
    """`QuantizedCache` with hqq, which groups along axis 1. Raises `ImportError` without it."""
    return QuantizedCache("hqq", config, nbits=bits, q_group_size=group_size, axis_key=1, axis_value=1)


def quanto_locks() -> list[Path]:
    """Files that lock the folders in which optimum-quanto builds the kernels that it has not loaded yet."""
    extensions: Any = importlib.import_module("optimum.quanto.library.extensions.extension")
    kept = getattr(extensions, "_extensions", {}).values()
    return [Path(each.build_directory) / "lock" for each in kept if each._lib is None]


def wait_for_locks(locks: Iterable[Path], *, seconds: float = 60.0) -> None:
    """Wait while another process builds; torch itself would wait for ever for one that was killed.

    Args:
        locks: Files that are there while something is built.
        seconds: How long to wait in all.

    Raises:
        TersorError: If one of them stays, naming it.
    """
    end = time.monotonic() + seconds
    for lock in locks:
        while lock.exists():
            if time.monotonic() > end:
                raise TersorError(f"{lock} says that kernels are being built; if nothing builds them, remove that file")
            time.sleep(0.1)

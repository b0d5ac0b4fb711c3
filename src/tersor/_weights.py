"""Where a folder keeps its safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tersor import _atomic
from tersor._errors import TersorError


def fingerprint(folder: Path) -> str:
    """SHA-256 over the safetensors of ``folder``, by name: what its weights are known by."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def weight_files(folder: Path, name: str) -> list[Path]:
    """The files of the weights ``name`` in ``folder``: its shards where there is an index, else that one file.

    Whether they are there is for the caller to see.

    Raises:
        ValueError: If the index file is not valid, or points outside the folder.
    """
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return [folder / name]
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise TersorError(f"{index} is not a weight index; fetch it again") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise TersorError(f"{index} points outside its folder ({shard!r}); do not use it")
    return [folder / shard for shard in shards]


def save_tensors(path: Path, tensors: Mapping[str, Any], *, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the mode that other new files get; readers see the old file or the new one."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with _atomic.replacing(path) as scratch:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, scratch, metadata=metadata)

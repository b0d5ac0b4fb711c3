"""Where a folder keeps its safetensors."""

from __future__ import annotations

import json
from pathlib import Path

from tersor._errors import TersorError


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

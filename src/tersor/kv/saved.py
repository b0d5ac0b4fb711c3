"""Saved caches read back, whichever recipe made them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tersor.kv.settings import recipe_from_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from tersor.kv.engine.cache import CompressedCache


def load_cache(path: str | Path, config: PreTrainedConfig, *, device: torch.device | str = "cpu") -> CompressedCache:
    """The cache that `CompressedCache.save` wrote; its ``choices`` run a session, its ``input_ids`` are what it read.

    The first forward checks that the model has the weights that filled the cache, by a sample of each parameter.

    Args:
        path: The file.
        config: Configuration of the model that will go on from it.
        device: Where the tensors go.

    Raises:
        ValueError: A `SavedCacheError` for a file that is missing, damaged, of a later version, of another model, or
            of choices that no recipe made.
    """
    from tersor.kv.engine.cache import CompressedCache
    from tersor.kv.engine.saving import SavedCache, SavedCacheError

    saved = SavedCache.read(path, device)
    if saved.recipe is None:
        raise SavedCacheError(f"{path} was made by choices of its own; use CompressedCache.load and pass them")
    return CompressedCache.load(saved, config, recipe_from_json(saved.recipe).named_method(), device=device)

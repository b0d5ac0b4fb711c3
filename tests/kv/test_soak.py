"""Long decoding with a batch that shrinks and grows: memory stays what the cache says it is."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from tiny_models import build, prompt

from tersor import MiniCache, ZipCache, compose
from tersor._compat import with_cache
from tersor.bench.measure import storage_bytes

pytestmark = pytest.mark.slow

CYCLES, PROMPT = 10, 120
RECIPES = {
    "zipcache": ZipCache(streaming_gap=50),
    "minicache": MiniCache(start_layer=0, streaming_gap=50, max_relative_error=1.0),
    "both": compose(ZipCache(streaming_gap=50), MiniCache(start_layer=0, max_relative_error=1.0)),
}


def live_tensor_bytes() -> int:
    """Bytes of every storage that a Python tensor still holds."""
    gc.collect()
    return storage_bytes([item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)])


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@torch.inference_mode()
def cycle(model, recipe, leaked: list[weakref.ref]) -> tuple[int, int]:
    """300 steps: a prompt for two rows, then 100 steps each with two, four and one of them.

    Returns the cache's own count of its bytes, and the bytes of all live tensors while it exists.
    """
    cache = recipe.cache(model.config)
    with recipe.on(model):
        model(prompt(2, PROMPT), **with_cache(cache))
        token = torch.tensor([[3], [5]])
        for layer in cache.compressed_layers():
            leaked += [weakref.ref(layer.keys.untyped_storage()), weakref.ref(layer.values.untyped_storage())]
        for change in (
            lambda x: x,
            lambda x: (cache.batch_repeat_interleave(2), x.repeat_interleave(2, 0))[1],
            lambda x: (cache.batch_select_indices(torch.tensor([3])), x[3:])[1],
        ):
            token = change(token)
            for _ in range(100):
                token = model(token, **with_cache(cache)).logits[:, -1:].argmax(-1)
    return cache.memory_footprint(), live_tensor_bytes()


@pytest.mark.parametrize("name", RECIPES)
def test_memory_is_flat_over_three_thousand_steps(name: str) -> None:
    model = build("llama")
    leaked: list[weakref.ref] = []
    owned, live, resident = [], [], []
    for _ in range(CYCLES):
        mine, everything = cycle(model, RECIPES[name], leaked)
        owned.append(mine)
        live.append(everything - mine)
        resident.append(resident_bytes())
    assert len(set(owned)) == 1
    assert max(live) <= 1.01 * min(live)
    # The allocator settles in the first cycles.
    assert max(resident[3:]) <= 1.01 * resident[2]
    gc.collect()
    assert all(reference() is None for reference in leaked)

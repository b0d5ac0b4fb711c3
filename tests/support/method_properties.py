"""What every KV method must keep, as functions of a `Case`; `PROPERTIES` lists them by name."""

from __future__ import annotations

import copy
import pickle
import re
import tempfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from methods import Case
from tiny_models import build, prompt
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tersor._compat import with_cache
from tersor.bench.measure import storage_bytes
from tersor.kv.engine.cache import CompressedCache
from tersor.kv.engine.tree import iter_tensors
from tersor.kv.saved import load_cache

#: Ways of generating, by options of `generate`.
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled sequences": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "chunked prefill": {"prefill_chunk_size": 13},
}
LENGTHS = (44, 31, 38)
TOKENS = 44


@lru_cache(maxsize=3)
def model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random Llama of two layers."""
    return build("llama", dtype=dtype)


def batch(side: str = "left", lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Prompts of these lengths, padded on one side: ids and mask ``[batch, tokens]``."""
    mask = torch.zeros(len(lengths), TOKENS, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, own_place(side, length)] = 1
    return prompt(len(lengths), TOKENS).masked_fill(mask == 0, 0), mask


def own_place(side: str, length: int) -> slice:
    """Columns of a row's own tokens."""
    return slice(TOKENS - length, TOKENS) if side == "left" else slice(0, length)


def generate(net: PreTrainedModel, mode: str) -> list[list[int]]:
    """New tokens of a left-padded batch; modes that take one sequence get one, with repetitions to look up."""
    torch.manual_seed(3)
    ids, mask = batch(lengths=(44, 31))
    if mode in ("prompt lookup", "chunked prefill"):
        ids = ids[:1, :22].repeat(1, 2)
        mask = torch.ones_like(ids)
    options = {"do_sample": False, **MODES[mode]}
    return net.generate(ids, attention_mask=mask, max_new_tokens=24, **options).tolist()


def raw_storage_generates_the_same_tokens(case: Case, mode: str) -> None:
    net = model()
    expected = generate(net, mode)
    with case.raw.on(net):
        assert generate(net, mode) == expected


def a_second_turn_goes_on_with_the_cache(case: Case) -> None:
    net = model()

    def turns(cache) -> list[int]:
        first = net.generate(prompt(1, 45), **with_cache(cache), max_new_tokens=14, do_sample=False)
        second = torch.cat([first, prompt(1, 30, seed=5)], dim=1)
        return net.generate(second, **with_cache(cache), max_new_tokens=14, do_sample=False).tolist()

    expected = turns(DynamicCache(config=net.config))
    with case.raw.on(net):
        assert turns(case.raw.cache(net.config)) == expected


def a_left_padded_batch_generates_as_single_rows(case: Case) -> None:
    """In float64 the model's own rounding, which differs between shapes, stays far below a code's width."""
    net = model(torch.float64)
    ids, mask = batch()
    options = {"max_new_tokens": 22, "do_sample": False}
    with case.recipe.on(net):
        together = net.generate(ids, attention_mask=mask, **options)
        for row, length in enumerate(LENGTHS):
            alone = net.generate(ids[row : row + 1, -length:], **options)
            assert alone[0, length:].tolist() == together[row, TOKENS:].tolist()


def padding_changes_nothing_that_is_stored(case: Case, side: str) -> None:
    net = model(torch.float64)
    ids, mask = batch(side)
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    with case.recipe.on(net), torch.no_grad():
        together = case.recipe.cache(net.config)
        net(ids, attention_mask=mask, position_ids=places, **with_cache(together))
        for row, length in enumerate(LENGTHS):
            own = own_place(side, length)
            alone = case.recipe.cache(net.config)
            net(ids[row : row + 1, own], **with_cache(alone))
            for layer in range(2):
                for many, one in zip(together.dequantize(layer), alone.dequantize(layer), strict=True):
                    torch.testing.assert_close(many[row, :, own], one[0], rtol=1e-9, atol=1e-9)


def run_steps(net: PreTrainedModel, cache: CompressedCache, ids: Tensor, mask: Tensor, start: int) -> Tensor:
    """Read a prompt, or go on one given token at a time; returns the last logits ``[batch, vocabulary]``."""
    if start == 0:
        start = TOKENS
        out = net(ids[:, :TOKENS], attention_mask=mask[:, :TOKENS], **with_cache(cache))
    for i in range(start, ids.shape[1]):
        out = net(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], **with_cache(cache))
    return out.logits[:, -1]


def longer(rows: int, steps: int, seed: int = 7) -> tuple[Tensor, Tensor]:
    """The batch of prompts and the tokens that follow them."""
    ids, mask = batch(lengths=LENGTHS[:rows])
    return torch.cat([ids, prompt(rows, steps, seed)], 1), torch.cat([mask, mask.new_ones(rows, steps)], 1)


OPERATIONS: dict[str, tuple[Callable[[CompressedCache], Any], Callable[[Tensor], Tensor]]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), lambda x: x[[2, 0, 0]]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), lambda x: x.repeat_interleave(2, 0)),
    "select by mask": (
        lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
        lambda x: x[[0, 2]],
    ),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), lambda x: x[[1, 2]]),
}


def operations_on_the_batch_commute_with_decoding(case: Case, name: str) -> None:
    operation, on_inputs = OPERATIONS[name]
    net = model(torch.float64)
    ids, mask = longer(3, 18)
    with case.recipe.on(net), torch.no_grad():
        after, before = (case.recipe.cache(net.config) for _ in range(2))
        run_steps(net, after, ids[:, : TOKENS + 6], mask, 0)
        operation(after)
        ids, mask = on_inputs(ids), on_inputs(mask)
        logits = run_steps(net, after, ids, mask, TOKENS + 6)
        torch.testing.assert_close(logits, run_steps(net, before, ids, mask, 0), rtol=1e-8, atol=1e-8)
    for layer in range(2):
        for got, expected in zip(after.dequantize(layer), before.dequantize(layer), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def a_crop_in_the_buffer_leaves_no_trace(case: Case) -> None:
    net = model(torch.float64)
    ids, mask = longer(2, 18)
    wrong = ids.clone()
    wrong[:, TOKENS + 4 : TOKENS + 8] = prompt(2, 4, seed=11)
    with case.recipe.on(net), torch.no_grad():
        cropped, plain = (case.recipe.cache(net.config) for _ in range(2))
        run_steps(net, cropped, wrong[:, : TOKENS + 8], mask, 0)
        cropped.crop(-4)
        assert cropped.get_seq_length() == TOKENS + 4
        logits = run_steps(net, cropped, ids, mask, TOKENS + 4)
        torch.testing.assert_close(logits, run_steps(net, plain, ids, mask, 0), rtol=1e-8, atol=1e-8)


def beams_of_a_batch_are_those_of_its_rows(case: Case) -> None:
    net = model(torch.float64)
    ids = prompt(2, 50)
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    with case.recipe.on(net):
        together = net.generate(ids, **options)
        for row in range(2):
            assert torch.equal(net.generate(ids[row : row + 1], **options)[0], together[row])


def bytes_are_counted_exactly_and_shrink(case: Case) -> None:
    net = model(torch.bfloat16)
    cache = case.recipe.cache(net.config)
    with case.recipe.on(net), torch.no_grad():
        net(prompt(1, 600), **with_cache(cache))
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in cache.state_dict().values()}
    assert cache.memory_footprint() == sum(storages.values())
    owned = [list(layer.owned().values()) for layer in cache.compressed_layers()]
    assert cache.memory_footprint() == storage_bytes([tensor for _, tensor in iter_tensors(owned)])
    assert cache.dense_footprint() == 2 * 2 * 2 * 600 * 2 * 8
    assert (cache.compression_ratio() > 1.2) == case.shrinks


def a_copy_goes_on_alike(case: Case, copied: Callable[[CompressedCache], CompressedCache]) -> None:
    net = model()
    ids, mask = longer(2, 18)
    with case.recipe.on(net), torch.no_grad():
        cache = case.recipe.cache(net.config)
        run_steps(net, cache, ids[:, : TOKENS + 6], mask, 0)
        clone = copied(cache)
        assert clone.memory_footprint() == cache.memory_footprint()
        logits = [run_steps(net, each, ids, mask, TOKENS + 6) for each in (cache, clone)]
        assert torch.equal(*logits)


def saved_and_loaded(cache: CompressedCache) -> CompressedCache:
    """What a file gives back; a method that no recipe made is passed again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cache.safetensors")
        cache.save(path)
        if cache.choices.recipe is None:
            return CompressedCache.load(path, cache.config, cache.choices)
        return load_cache(path, cache.config)


PROPERTIES: dict[str, Callable[[Case], None]] = {
    **{mode: partial(raw_storage_generates_the_same_tokens, mode=mode) for mode in MODES},
    "second turn": a_second_turn_goes_on_with_the_cache,
    "left padding": a_left_padded_batch_generates_as_single_rows,
    "stored left padding": partial(padding_changes_nothing_that_is_stored, side="left"),
    "stored right padding": partial(padding_changes_nothing_that_is_stored, side="right"),
    **{name: partial(operations_on_the_batch_commute_with_decoding, name=name) for name in OPERATIONS},
    "crop": a_crop_in_the_buffer_leaves_no_trace,
    "rows of beams": beams_of_a_batch_are_those_of_its_rows,
    "bytes": bytes_are_counted_exactly_and_shrink,
    "deep copy": partial(a_copy_goes_on_alike, copied=copy.deepcopy),
    "file": partial(a_copy_goes_on_alike, copied=saved_and_loaded),
    "pickle": partial(a_copy_goes_on_alike, copied=lambda cache: pickle.loads(pickle.dumps(cache))),
}


def check(case: Case, name: str) -> None:
    """The method has the property, or refuses it with the reason that its case states."""
    if name in case.exempt:
        pytest.skip(case.exempt[name])
    elif name in case.refuses:
        with pytest.raises(NotImplementedError, match=re.escape(case.refuses[name])):
            PROPERTIES[name](case)
    else:
        PROPERTIES[name](case)

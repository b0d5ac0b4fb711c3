"""On the real classes: stored raw, every way of generating gives the tokens of a `DynamicCache`."""

from __future__ import annotations

import pytest
import torch
from kv_driver import (
    SMALL,
    Attention,
    filled,
    step,
    stream,
)
from tiny_models import NAMES, build, model, prompt
from transformers import DynamicCache, PreTrainedModel

from tersor._compat import with_cache
from tersor.kv.engine import attention
from tersor.kv.engine.attention import tersor_attention
from tersor.kv.engine.cache import CompressedCache
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.zipcache import ZipCache

NEW = 40


# Two ways to store raw: one group, and two groups whose order differs from that of the tokens.
RAW = {
    "one group": ZipCache(saliency_ratio=1.0, high_bits=16, streaming_gap=16),
    "two groups": ZipCache(saliency_ratio=0.5, high_bits=16, low_bits=16, streaming_gap=16),
}


MODES = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 20},
    "return sequences": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "chunked prefill": {"prefill_chunk_size": 13},
}


def inputs(mode: str) -> dict[str, torch.Tensor]:
    """A left-padded batch; the modes that take one sequence only get one, with repetitions to look up."""
    ids = prompt(2, 50)
    if mode in ("prompt lookup", "chunked prefill"):
        ids = ids[:1].repeat(1, 2)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    mask = torch.ones_like(ids)
    mask[1, :21] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(net: PreTrainedModel, mode: str, **kwargs) -> torch.Tensor:
    torch.manual_seed(3)
    options = {"do_sample": False, **MODES[mode], **kwargs}
    with torch.no_grad():
        return net.generate(**inputs(mode), max_new_tokens=NEW, **options)


def check_identical(name: str, mode: str, recipe: ZipCache) -> CompressedCache:
    net = model(name)
    expected = generate(net, mode)
    with recipe.on(net) as session:
        output = generate(net, mode)
    assert output.tolist() == expected.tolist()
    assert session.cache is not None
    return session.cache


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_raw_storage_generates_the_same_tokens(name: str, mode: str) -> None:
    for recipe in RAW.values():
        cache = check_identical(name, mode, recipe)
        assert all(len(layer.segments) >= 2 for layer in cache.compressed_layers())


def two_turns(net: PreTrainedModel, cache) -> list[list[int]]:
    """Chat: the second call gets the whole conversation and reuses the cache of the first."""
    ids = prompt(1, 45)
    first = net.generate(ids, **with_cache(cache), max_new_tokens=20, do_sample=False)
    second = torch.cat([first, prompt(1, 30, seed=5)], dim=1)
    third = net.generate(second, **with_cache(cache), max_new_tokens=20, do_sample=False)
    return [first.tolist(), third.tolist()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*has no full-attention layer:UserWarning")
def test_two_turns_with_one_cache(name: str) -> None:
    net = model(name)
    expected = two_turns(net, DynamicCache(config=net.config))
    for recipe in RAW.values():
        with recipe.on(net):
            assert two_turns(net, recipe.cache(net.config)) == expected


def test_the_check_catches_a_missing_mask_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mask function transformers drops the padding mask and says nothing."""
    mapping = attention.AttentionMaskInterface._global_mapping
    monkeypatch.delitem(mapping, "tersor")
    with pytest.raises(AssertionError):
        check_identical("llama", "greedy", RAW["one group"])


def test_the_check_catches_lost_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.kv.engine.layer import CompressedLayer
    from tersor.lowbit.kernels.packed_attention import PartTable

    monkeypatch.setattr(CompressedLayer, "parts", PartTable())
    with pytest.raises(AssertionError):
        check_identical("llama", "greedy", RAW["one group"])


@pytest.mark.parametrize("name", [name for name in NAMES])
def test_eight_bits_stay_close_to_the_full_cache(name: str) -> None:
    """Logits of the step after the prompt."""
    net = build(name, sharpness=0.5)
    ids = prompt(1, 80)
    logits = []
    recipe = ZipCache(saliency_ratio=1.0, high_bits=8, min_tokens_to_compress=8)
    for cache in (DynamicCache(config=net.config), recipe.cache(net.config)):
        with recipe.on(net), torch.no_grad():
            net(ids[:, :-1], **with_cache(cache))
            logits.append(net(ids[:, -1:], **with_cache(cache)).logits)
    # A large key bias widens the range of every key channel: the rotated bias is a sinusoid in the position.
    tolerance = 5e-2 if name == "qwen2" else 1e-2
    assert (logits[1] - logits[0]).abs().max() < tolerance * logits[0].abs().max()


def check_left_padded_batch(net: PreTrainedModel, recipe: ZipCache) -> None:
    """Same tokens and the same codes, bit for bit, alone and in a padded batch."""
    ids = prompt(3, 60)
    lengths = [60, 41, 33]
    mask = torch.ones_like(ids)
    for sample, length in enumerate(lengths):
        mask[sample, : 60 - length] = 0
    options = {"max_new_tokens": 30, "do_sample": False}
    with recipe.on(net) as session, torch.no_grad():
        together = net.generate(ids.masked_fill(mask == 0, 0), attention_mask=mask, **options)
        batch_cache = session.cache
        for sample, length in enumerate(lengths):
            alone = net.generate(ids[sample : sample + 1, -length:], **options)
            assert alone[0, length:].tolist() == together[sample, 60:].tolist()
            assert batch_cache is not None
            assert session.cache is not None
            for one, many in zip(session.cache.compressed_layers(), batch_cache.compressed_layers(), strict=True):
                for mine, theirs in zip(one.segments, many.segments, strict=True):
                    for single, padded in zip(mine.groups, theirs.groups, strict=True):
                        slots = slice(None) if padded.valid is None else padded.valid[sample, 0]
                        assert torch.equal(padded.keys.codes[sample][:, slots], single.keys.codes[0])
                        assert torch.equal(padded.values.codes[sample][:, slots], single.values.codes[0])
                        assert torch.equal(padded.keys.step[sample], single.keys.step[0])


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_left_padded_batch_equals_single_runs(name: str) -> None:
    # In float64 the model's own rounding, which differs between batch shapes, stays far below a code's width.
    check_left_padded_batch(build(name, dtype=torch.float64), ZipCache(streaming_gap=20))


def test_half_precision_models_keep_their_dtype() -> None:
    net = build("llama", dtype=torch.bfloat16)
    with ZipCache(streaming_gap=20).on(net) as session, torch.no_grad():
        net.generate(prompt(2, 50), max_new_tokens=30, do_sample=False)
    assert session.cache is not None
    keys, values = session.cache.dequantize(0)
    assert keys.dtype == values.dtype == torch.bfloat16
    assert keys.shape[2] == 79
    assert session.cache.layers[0].keys.dtype == torch.bfloat16


def test_training_through_the_cache_is_refused() -> None:
    module = Attention().train()
    query, keys, values = (x.requires_grad_() for x in stream(1, 40))
    layer = CompressedLayer(ZipCache().method(), 0)
    with pytest.raises(RuntimeError, match="no gradient"):
        tersor_attention(module, query, *layer.update(keys, values), None)


def test_a_short_mask_is_refused() -> None:
    tensors = stream(1, 41)
    layer = filled(ZipCache(**SMALL), tensors, 40, 40)
    with pytest.raises(ValueError, match="covers 1 tokens but the cache holds 41"):
        step(layer, *(x[:, :, 40:] for x in tensors), mask=torch.ones(1, 1, 1, 1, dtype=torch.bool))

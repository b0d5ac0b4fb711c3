"""The compressed cache: sizes, summaries, copies, and the models it is made for."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from tiny_models import SLIDING, build, prompt
from transformers import DeepseekV3Config, MambaConfig, T5Config
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tersor._compat import with_cache
from tersor.bench.measure import storage_bytes
from tersor.kv.engine.cache import CompressedCache
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.zipcache import ZipCache
from tersor.lowbit.bytes import segment_bytes


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def prefilled(model, recipe, tokens: int = 1024, batch: int = 1) -> CompressedCache:
    cache = recipe.cache(model.config)
    with recipe.on(model), torch.no_grad():
        model(prompt(batch, tokens), **with_cache(cache))
    return cache


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("ratio", [0.4, 0.6, 1.0])
def test_compression_ratio_is_within_two_percent_of_the_formula(llama, batch: int, ratio: float) -> None:
    recipe = ZipCache(saliency_ratio=ratio)
    cache = prefilled(llama, recipe, batch=batch)
    regular = int((1 - ratio) * 1024)
    formula = 2 * segment_bytes([(1024 - regular, 4), (regular, 2)], batch=batch, kv_heads=2, key_dim=8, value_dim=8)
    dense = 2 * 2 * 2 * batch * 1024 * 2 * 8
    assert cache.dense_footprint() == dense
    assert cache.compression_ratio() == pytest.approx(dense / formula, rel=0.02)
    assert cache.memory_footprint() == storage_bytes([layer.owned() for layer in cache.layers])


def test_summary_counts_what_is_stored(llama) -> None:
    cache = prefilled(llama, ZipCache(skip_layers=(1,)), tokens=100)
    summary = cache.summary()
    assert summary["tokens_by_width"] == {"4-bit": 60, "2-bit": 40, "buffer": 0}
    assert summary["compressed_layers"] == summary["other_layers"] == 1
    assert summary["tokens"] == 100
    json.dumps(summary)
    assert isinstance(cache.layers[1], DynamicLayer)


def test_dequantize_restores_order_and_refuses_other_layers(llama) -> None:
    recipe = ZipCache(saliency_ratio=0.5, high_bits=8, low_bits=8, skip_layers=(1,))
    dense, cache = (prefilled(llama, r, tokens=64) for r in (ZipCache(saliency_ratio=1.0, high_bits=16), recipe))
    for exact, restored in zip(dense.dequantize(0), cache.dequantize(0), strict=True):
        torch.testing.assert_close(restored, exact, atol=0.1, rtol=0)
    for wrong in (1, 7, -1):
        with pytest.raises(ValueError, match=r"layers that do: \[0\]"):
            cache.dequantize(wrong)


def test_copies_and_state_dict_hold_the_same(llama) -> None:
    recipe = ZipCache(streaming_gap=16)
    cache = prefilled(llama, recipe, tokens=90)
    for clone in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        for name, tensor in cache.state_dict().items():
            assert torch.equal(clone.state_dict()[name], tensor)
        with recipe.on(llama), torch.no_grad():
            outputs = [
                llama.generate(prompt(1, 100), **with_cache(c), max_new_tokens=20, do_sample=False)
                for c in (clone, copy.deepcopy(cache))
            ]
        assert torch.equal(*outputs)


def test_window_and_full_layers_share_a_cache() -> None:
    cache = ZipCache().cache(build("gemma3").config)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, CompressedLayer]


def test_a_model_of_windows_only_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="no full-attention layer to compress"):
        ZipCache().cache(SLIDING)


def test_encoder_decoders_and_recurrent_models_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="encoder-decoder"):
        ZipCache().cache(T5Config())
    with pytest.raises(NotImplementedError, match="no attention layer"):
        ZipCache().cache(MambaConfig(num_hidden_layers=2))
    with pytest.raises(NotImplementedError, match="latent"):
        ZipCache().cache(DeepseekV3Config())

"""Reporting of a whole cache, and how a session takes hold of a model and lets go."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from tiny_models import build, prompt
from transformers import DeepseekV3Config, MambaConfig, T5Config, T5ForConditionalGeneration
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tersor.bench.measure import storage_bytes
from tersor.kv import METHODS, get_method
from tersor.kv.engine.cache import CompressedCache
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.method import KVMethod
from tersor.kv.selection.ratio import RecentSelection
from tersor.kv.storage.mixed import MixedPrecisionStorage
from tersor.kv.zipcache import ZipCache
from tersor.lowbit.bytes import segment_bytes


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def prefilled(model, recipe, tokens: int = 1024, batch: int = 1) -> CompressedCache:
    cache = recipe.cache(model.config)
    with recipe.on(model), torch.no_grad():
        model(prompt(batch, tokens), past_key_values=cache)
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
                llama.generate(prompt(1, 100), past_key_values=c, max_new_tokens=20, do_sample=False)
                for c in (clone, copy.deepcopy(cache))
            ]
        assert torch.equal(*outputs)


def test_window_and_full_layers_share_a_cache() -> None:
    cache = ZipCache().cache(build("gemma3").config)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, CompressedLayer]


def test_a_model_of_windows_only_warns() -> None:
    with pytest.warns(UserWarning, match="no full-attention layer to compress"):
        ZipCache().cache(build("mistral_sliding").config)


def test_encoder_decoders_and_recurrent_models_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="encoder-decoder"):
        ZipCache().cache(T5Config())
    with pytest.raises(NotImplementedError, match="no attention layer"):
        ZipCache().cache(MambaConfig(num_hidden_layers=2))
    with pytest.raises(NotImplementedError, match="latent"):
        ZipCache().cache(DeepseekV3Config())


# -- sessions ------------------------------------------------------------------------------------------------------


def test_leaving_restores_the_model() -> None:
    for name in ("llama", "gemma2", "qwen2_5_vl"):
        model = build(name)
        before, members = model.config.to_dict(), dict(vars(model))
        implementations = {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
        with pytest.raises(KeyError), ZipCache().on(model):
            raise KeyError("an error inside must not leave the model changed")
        assert model.config.to_dict() == before
        assert dict(vars(model)) == members
        assert implementations == {
            id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")
        }


def test_the_vision_tower_keeps_its_attention() -> None:
    model = build("qwen2_5_vl")
    vision = model.config.vision_config._attn_implementation
    with ZipCache().on(model):
        assert model.config.vision_config._attn_implementation == vision
        assert model.config.text_config._attn_implementation == "tersor"


def test_enable_and_disable(llama) -> None:
    session = ZipCache().on(llama)
    session.enable()
    with pytest.raises(RuntimeError, match="disable"):
        ZipCache().on(llama).enable()
    llama.generate(prompt(1, 40), max_new_tokens=2, do_sample=False)
    assert isinstance(session.cache, CompressedCache)
    session.disable()
    session.disable()
    assert llama.config._attn_implementation == "sdpa"


def test_use_cache_false_and_own_caches_are_left_alone(llama) -> None:
    expected = llama.generate(prompt(1, 40), max_new_tokens=4, do_sample=False)
    with ZipCache().on(llama) as session:
        output = llama.generate(prompt(1, 40), max_new_tokens=4, do_sample=False, use_cache=False)
        assert session.cache is None
        assert torch.equal(output, expected)


def test_leaving_the_session_with_a_live_cache_stays_right(llama) -> None:
    """The next step without the attention function gets dequantized tokens, not the buffer alone."""
    recipe = ZipCache(saliency_ratio=1.0, high_bits=16, streaming_gap=16)
    ids = prompt(1, 60)
    cache = recipe.cache(llama.config)
    with recipe.on(llama), torch.no_grad():
        llama(ids[:, :50], past_key_values=cache)
    with torch.no_grad():
        output = llama(ids[:, 50:], past_key_values=cache).logits
        torch.testing.assert_close(output, llama(ids).logits[:, 50:], rtol=1e-4, atol=1e-4)


def test_models_without_selectable_attention_are_refused() -> None:
    model = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=4, num_layers=1, num_heads=2, d_ff=16, decoder_start_token_id=0)
    )
    with pytest.raises(NotImplementedError, match="encoder-decoder"), ZipCache().on(model):
        pass
    assert "_prepare_cache_for_generation" not in vars(model)


def test_own_compositions_run(llama) -> None:
    method = KVMethod(
        selection=RecentSelection(ratio=0.25),
        storage=MixedPrecisionStorage(high_bits=16, low_bits=0),
        streaming_gap=16,
    )
    with method.on(llama) as session:
        llama.generate(prompt(1, 64), max_new_tokens=8, do_sample=False)
    assert session.cache is not None
    assert session.cache.summary()["tokens_by_width"]["raw"] == 2 * 16


def test_registry() -> None:
    assert get_method("zipcache") is ZipCache
    for name in METHODS:
        assert get_method(name)().method().name == name
    with pytest.raises(ValueError, match="choose one of"):
        get_method("nocache")

"""Sessions: entering and leaving, what runs inside, and what is refused."""

from __future__ import annotations

import pytest
import torch
from tiny_models import SLIDING, build, model, prompt, question
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    T5Config,
    T5ForConditionalGeneration,
)

from tersor._compat import with_cache
from tersor.kv.depth.pairs import MergedPairs
from tersor.kv.engine.cache import CompressedCache
from tersor.kv.method import KVMethod
from tersor.kv.selection.ratio import RecentSelection
from tersor.kv.storage.mixed import MixedPrecisionStorage
from tersor.kv.zipcache import ZipCache
from tersor.kv.zipvl import ZipVL

SPARSE = ZipVL(tau=0.8, min_tokens=0)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


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


def test_without_a_cache_there_is_nothing_to_compress(llama) -> None:
    with ZipCache().on(llama) as session:
        with pytest.raises(ValueError, match="use_cache=False leaves zipcache nothing to compress"):
            llama.generate(prompt(1, 40), max_new_tokens=4, do_sample=False, use_cache=False)
        assert session.cache is None


def test_a_cache_of_ones_own_is_used_and_named(llama) -> None:
    options = {"max_new_tokens": 4, "do_sample": False}
    filled = DynamicCache(config=llama.config)
    llama(prompt(1, 10), **with_cache(filled))
    with ZipCache().on(llama) as session:
        with pytest.warns(UserWarning, match="given a DynamicCache, which zipcache does not compress"):
            llama.generate(prompt(1, 40), **with_cache(filled), **options)
        assert session.cache is None and filled.get_seq_length() == 43
        # An empty one of the library's is what `generate` makes itself.
        llama.generate(prompt(1, 40), **with_cache(DynamicCache()), **options)
        assert session.cache.get_seq_length() == 43


def test_leaving_the_session_with_a_live_cache_stays_right(llama) -> None:
    """The next step without the attention function gets dequantized tokens, not the buffer alone."""
    recipe = ZipCache(saliency_ratio=1.0, high_bits=16, streaming_gap=16)
    ids = prompt(1, 60)
    cache = recipe.cache(llama.config)
    with recipe.on(llama), torch.no_grad():
        llama(ids[:, :50], **with_cache(cache))
    with torch.no_grad():
        output = llama(ids[:, 50:], **with_cache(cache)).logits
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


def test_the_engine_runs_on_choices_of_ones_own() -> None:
    model = build("llama")
    method = KVMethod(
        selection=RecentSelection(ratio=0.25),
        storage=MixedPrecisionStorage(high_bits=16, low_bits=0),
        depth=MergedPairs(start_layer=0, gamma=0.0, merge="mean", max_relative_error=2.0),
        streaming_gap=16,
    )
    with method.on(model) as session, torch.no_grad():
        model.generate(prompt(1, 64), max_new_tokens=8, do_sample=False)
    assert session.cache is not None
    assert session.cache.summary()["tokens_by_width"]["raw"] == 2 * 16


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl", "llava"])
def test_leaving_restores_every_bit(name: str) -> None:
    net = build(name)
    inputs = {"input_ids": prompt(2, 60)}
    with torch.no_grad():
        expected = net(**inputs).logits
    before, members, hooks = net.config.to_dict(), dict(vars(net)), len(net._forward_pre_hooks)
    with pytest.raises(KeyError), SPARSE.on(net), torch.no_grad():
        assert not torch.equal(net(**inputs).logits, expected)
        raise KeyError("an error inside must not leave the model changed")
    with torch.no_grad():
        assert torch.equal(net(**inputs).logits, expected)
    assert (net.config.to_dict(), dict(vars(net)), len(net._forward_pre_hooks)) == (before, members, hooks)
    assert not net._forward_pre_hooks_with_kwargs


UNSUPPORTED = {
    "prompt lookup": ({"prompt_lookup_num_tokens": 4}, "assisted decoding, prompt lookup and crop"),
    "chunks": ({"prefill_chunk_size": 16}, "prefill_chunk_size does not go"),
    "static": ({"cache_implementation": "static"}, "cache_implementation='static' is a cache of the library's"),
}


@pytest.mark.parametrize("mode", UNSUPPORTED)
def test_unsupported_ways_of_generating_are_refused(mode: str) -> None:
    options, message = UNSUPPORTED[mode]
    net = model("llama")
    with SPARSE.on(net), pytest.raises(NotImplementedError, match=message):
        net.generate(prompt(1, 60), max_new_tokens=4, **options)


def test_continuous_batching_is_refused() -> None:
    net = model("llama")
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=1, pad_token_id=0)
    with SPARSE.on(net), pytest.raises(ValueError, match="not supported for continuous batching"):
        net.generate_batch([[3, 4, 5]], generation_config=settings)


def test_crop_is_refused() -> None:
    net = model("llama")
    cache = SPARSE.cache(net.config)
    with SPARSE.on(net), torch.no_grad():
        net(prompt(1, 60), **with_cache(cache))
    assert not cache.is_croppable
    with pytest.raises(NotImplementedError, match="none can be taken back"):
        cache.crop(-1)


def test_attention_weights_are_not_there() -> None:
    net = model("llama")
    with SPARSE.on(net), torch.no_grad(), pytest.warns(UserWarning, match="computes no attention matrix"):
        out = net(prompt(1, 60), output_attentions=True)
    assert not any(each is not None for each in out.attentions or ())


def test_evicted_tokens_cannot_be_read_outside_of_a_session() -> None:
    net = model("llama")
    cache = SPARSE.cache(net.config)
    with SPARSE.on(net), torch.no_grad():
        net(prompt(1, 60), **with_cache(cache))
    with pytest.raises(RuntimeError, match="evicts tokens"):
        net(prompt(1, 1), **with_cache(cache))


def test_a_model_without_full_attention_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="no full-attention layer"):
        SPARSE.cache(SLIDING)


def test_custom_processors_see_the_sparse_logits() -> None:
    """The first generated token comes from the last prompt token, which is always kept."""
    net, seen = model("llama"), []
    note = LogitsProcessorList([lambda _, scores: seen.append(scores.clone()) or scores])
    with SPARSE.on(net) as session, torch.no_grad():
        net.generate(prompt(1, 60), max_new_tokens=1, do_sample=False, logits_processor=note)
        assert all(59 in own[0].tolist() for own in session.stats.kept)
        torch.testing.assert_close(seen[0], net(prompt(1, 60)).logits[:, -1])


def test_the_vision_tower_keeps_its_own_attention() -> None:
    """A plain string would switch it as well; modules that are not causal go to the library."""
    net = build("qwen2_5_vl")
    inputs = question(net)
    with torch.no_grad():
        features = net.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[0]
        net.set_attn_implementation("tersor")
        same = net.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[0]
    assert torch.equal(features, same)

"""ZipVL on library models: entering and leaving sessions, and what is refused."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from tiny_models import build, prompt
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StaticCache

from tersor.kv.storage.mixed import MixedPrecisionStorage
from tersor.kv.zipvl import ZipVL

SPARSE = ZipVL(tau=0.8, min_tokens=0)


@lru_cache(maxsize=2)
def model(name: str) -> PreTrainedModel:
    return build(name)


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


def test_an_empty_library_cache_is_replaced_and_a_filled_one_refused() -> None:
    net = model("llama")
    filled = DynamicCache(config=net.config)
    net(prompt(1, 10), past_key_values=filled)
    with SPARSE.on(net) as session, torch.no_grad():
        out = net(prompt(1, 60), past_key_values=DynamicCache(config=net.config))
        assert out.past_key_values is session.cache
        assert session.cache.layers[0].segments
        with pytest.raises(ValueError, match="holds 10 tokens already"):
            net(prompt(1, 60), past_key_values=filled)
        with pytest.raises(NotImplementedError, match="StaticCache cannot hold"):
            net(prompt(1, 60), past_key_values=StaticCache(config=net.config, max_cache_len=80))


UNSUPPORTED = {
    "prompt lookup": ({"prompt_lookup_num_tokens": 4}, "assisted decoding, prompt lookup and crop"),
    "chunks": ({"prefill_chunk_size": 16}, "prefill_chunk_size does not go"),
    "static": ({"cache_implementation": "static"}, "cache_implementation='static' cannot hold"),
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
        net(prompt(1, 60), past_key_values=cache)
    assert not cache.is_croppable
    with pytest.raises(NotImplementedError, match="none can be taken back"):
        cache.crop(-1)


def test_text_is_protected_only_where_it_can_be_told() -> None:
    for name, inputs in (("llama", {"input_ids": prompt(1, 40)}), ("llava", {"inputs_embeds": torch.randn(1, 40, 32)})):
        net = model(name)
        recipe = ZipVL(tau=0.8, min_tokens=0, protect="text")
        with recipe.on(net), pytest.raises(ValueError, match="which tokens are text"):
            net(**inputs)
        with SPARSE.on(net) as session, torch.no_grad():
            net(**inputs)
            assert session.stats.token_ratio < 1


def test_wrong_completion_masks_are_refused() -> None:
    net, ids = model("llama"), prompt(1, 40)
    early = torch.zeros(1, 40, dtype=torch.bool)
    early[0, :5] = True
    with SPARSE.on(net), torch.no_grad():
        with pytest.raises(ValueError, match=r"shape \(1, 8\), but the input is \(1, 40\)"):
            net(ids, completion_mask=torch.zeros(1, 8))
        with pytest.raises(ValueError, match="completions come last"):
            net(ids, completion_mask=early)
        cache = net(ids).past_key_values
        with pytest.raises(ValueError, match="without a filled cache"):
            net(ids, completion_mask=~early, past_key_values=cache)


def test_attention_weights_are_not_there() -> None:
    net = model("llama")
    with SPARSE.on(net), torch.no_grad(), pytest.warns(UserWarning, match="computes no attention matrix"):
        out = net(prompt(1, 60), output_attentions=True)
    assert not any(each is not None for each in out.attentions or ())


def test_evicted_tokens_cannot_be_read_outside_of_a_session() -> None:
    net = model("llama")
    cache = SPARSE.cache(net.config)
    with SPARSE.on(net), torch.no_grad():
        net(prompt(1, 60), past_key_values=cache)
    with pytest.raises(RuntimeError, match="evicts tokens"):
        net(prompt(1, 1), past_key_values=cache)


def test_a_model_without_full_attention_warns() -> None:
    with pytest.warns(UserWarning, match="no full-attention layer"):
        SPARSE.cache(build("mistral_sliding").config)


def test_custom_processors_see_the_sparse_logits() -> None:
    """The first generated token comes from the last prompt token, which is always kept."""
    net, seen = model("llama"), []
    note = LogitsProcessorList([lambda _, scores: seen.append(scores.clone()) or scores])
    with SPARSE.on(net) as session, torch.no_grad():
        net.generate(prompt(1, 60), max_new_tokens=1, do_sample=False, logits_processor=note)
        assert all(59 in own[0].tolist() for own in session.stats.kept)
        torch.testing.assert_close(seen[0], net(prompt(1, 60)).logits[:, -1])


def test_storage_of_evict_is_the_models_precision() -> None:
    net = build("llama", dtype=torch.bfloat16)
    assert SPARSE.method().storage == MixedPrecisionStorage(high_bits=16, low_bits=0)
    with SPARSE.on(net) as session, torch.no_grad():
        net.generate(prompt(2, 60), max_new_tokens=5, do_sample=False)
    group = session.cache.layers[0].segments[0].groups[0]
    assert group.keys.dtype == torch.bfloat16

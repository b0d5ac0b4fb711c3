"""Subtracting a rotated key bias is exact, and takes it out of the way of the quantizer."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build, prompt
from torch import Tensor

from tersor import MiniCache, ZipCache, compose
from tersor._compat import with_cache
from tersor.kv.engine.call import AttentionCall
from tersor.kv.storage.key_bias import KeyBias, RotaryTable

SMALL = {"streaming_gap": 12, "min_tokens_to_compress": 8}


def attention_of(model) -> torch.nn.Module:
    return model.get_decoder().layers[1].self_attn


@pytest.fixture(scope="module", params=["qwen2", "phi"])  # phi rotates a part of its channels
def model(request: pytest.FixtureRequest):
    """Biases some twenty times as large as the signal, as in the first layers of Qwen2."""
    model = build(request.param)
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            layer.self_attn.k_proj.bias.mul_(20)
    return model


def rotated_by_the_model(model, positions: Tensor) -> Tensor:
    """What the model caches for hidden states of zero: its rotated bias and nothing else."""
    from transformers import DynamicCache

    attention = attention_of(model)
    hidden = torch.zeros(positions.shape[0], positions.shape[1], model.config.hidden_size)
    cache = DynamicCache()
    waves = model.get_decoder().rotary_emb(hidden, positions)
    attention(hidden, position_embeddings=waves, attention_mask=None, **with_cache(cache))
    return cache.layers[attention.layer_idx].keys


@torch.no_grad()
def test_keys_and_scores_are_the_models_own(model) -> None:
    attention = attention_of(model)
    bias = KeyBias.of(attention)
    positions = torch.tensor([[0, 1, 2, 300, 5000], [0, 0, 0, 1, 7]])
    keys = rotated_by_the_model(model, positions)
    torch.testing.assert_close(bias.keys(positions, 5001), keys, rtol=1e-4, atol=1e-3)
    query = torch.randn(2, 4, 3, attention.head_dim)
    tokens = torch.arange(5, 5010)[None]  # the first sample begins at token 9, the second at token 5
    for first in (torch.tensor([0, 0]), torch.tensor([9, 5]), torch.tensor([-7, -2])):
        bias = KeyBias.of(attention)
        bias.note_positions(5009 - first[:, None], last=5009, like=query, layer=0)
        scores = bias.scores(query, 5010, 0.3)[..., 5:]
        keys = rotated_by_the_model(model, (tokens - first[:, None]).clamp_min(0))
        expected = 0.3 * query @ keys.repeat_interleave(4 // keys.shape[1], dim=1).transpose(-1, -2)
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-2)


def reconstruction_error(model, recipe: ZipCache) -> float:
    """Largest error of any cached key, against the model's own cache."""
    ids = prompt(1, 60)
    with torch.no_grad():
        exact = model(ids, use_cache=True).past_key_values.layers
        with recipe.on(model):
            cache = recipe.cache(model.config)
            model(ids, **with_cache(cache))
    return max(float((cache.dequantize(i)[0] - exact[i].keys).abs().max()) for i in range(len(exact)))


def test_the_error_of_rounded_keys_falls(model) -> None:
    plain = reconstruction_error(model, ZipCache(saliency_ratio=1.0, **SMALL))
    subtracted = reconstruction_error(model, ZipCache(saliency_ratio=1.0, subtract_key_bias=True, **SMALL))
    assert subtracted < 0.1 * plain


@torch.no_grad()
def test_fused_decoding_equals_attention_over_the_dequantized_cache(model) -> None:
    """Prompt, segments from decoding, left padding, then one step both ways."""
    recipe = ZipCache(subtract_key_bias=True, **SMALL)
    ids, mask = prompt(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    with recipe.on(model) as running:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
        cache = running.cache
        assert cache is not None
        layer = cache.layers[1]
        assert len(layer.segments) > 2
        query = torch.randn(2, 4, 1, attention_of(model).head_dim)
        visible = torch.cat([mask, mask.new_ones(2, layer.get_seq_length() - 40)], dim=1).bool()[:, None, None]
        call = AttentionCall(attention_of(model), query, layer.keys, layer.values, visible, scaling=0.3)
        fused, _ = layer.attend(call)
    keys, values, present = layer.dequantize()
    group = 4 // keys.shape[1]
    keys, values, present = (x.repeat_interleave(group, dim=1) for x in (keys, values, present))
    scores = (query @ keys.transpose(-1, -2) * 0.3).masked_fill(~(visible & present[:, :, None]), -torch.inf)
    torch.testing.assert_close(fused, scores.softmax(-1) @ values, rtol=1e-3, atol=1e-3)
    assert out.sequences.shape == (2, 70)


@torch.no_grad()
def test_batch_operations_and_crop_keep_positions() -> None:
    model = build("qwen2")
    recipe = ZipCache(subtract_key_bias=True, **SMALL)
    ids, mask = prompt(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    with recipe.on(model):
        cache, alone = recipe.cache(model.config), recipe.cache(model.config)
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        model(ids, attention_mask=mask, position_ids=places, **with_cache(cache))
        cache.batch_select_indices(torch.tensor([1]))
        cache.crop(-3)
        model(ids[1:, 9:37], **with_cache(alone))
    assert torch.equal(cache.layers[0].key_bias.first_place, torch.tensor([9]))
    for got, expected in zip(cache.dequantize(1), alone.dequantize(1), strict=True):
        # Cropping keeps the parameters of the longer prompt.
        assert (got[:, :, 9:] - expected).abs().mean() < 0.2 * expected.abs().mean()


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ValueError, match="adds no bias"):
        KeyBias.of(attention_of(build("llama")))
    with pytest.raises(NotImplementedError, match="one fixed angle"):
        KeyBias.of(attention_of(build("qwen2_5_vl")))
    with pytest.raises(ValueError, match="subtract_key_bias"):
        ZipCache(subtract_key_bias=True, high_bits=16)
    with pytest.raises(ValueError, match="merged layers"):
        compose(ZipCache(subtract_key_bias=True), MiniCache())
    model = build("qwen2")
    recipe = ZipCache(subtract_key_bias=True, **SMALL)
    with recipe.on(model), torch.no_grad():
        cache = recipe.cache(model.config)
        model(prompt(1, 20), **with_cache(cache))
        with pytest.raises(ValueError, match="count up by one"):
            model(prompt(1, 1), **with_cache(cache), position_ids=torch.tensor([[77]]))
    with pytest.raises(RuntimeError, match="add back"), torch.no_grad():
        cache = recipe.cache(model.config)
        for _ in range(2):
            model(prompt(1, 20), **with_cache(cache))


def test_another_rotation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen2 import modeling_qwen2

    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    with pytest.raises(NotImplementedError, match="another way"):
        KeyBias.of(attention_of(build("qwen2")))


def test_layers_share_one_table() -> None:
    model = build("qwen2")
    tables = {id(KeyBias.of(layer.self_attn).table) for layer in model.get_decoder().layers}
    assert len(tables) == 1
    assert isinstance(KeyBias.of(attention_of(model)).table, RotaryTable)

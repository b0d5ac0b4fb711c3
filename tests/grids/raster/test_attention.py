"""Grouped attention gives what the library gives, on real classes and alone, and leaves no trace."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tersor
from tersor.grids.raster import attention
from tersor.grids.raster.attention import NAME, grouped_attention, with_grouped_attention


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    queries=st.integers(1, 5),
    extra=st.integers(0, 9),
    additive=st.booleans(),
)
def test_the_numbers_are_those_of_the_library(seed, batch, kv_heads, group, queries, extra, additive) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = queries + extra
    query = torch.randn(batch, kv_heads * group, queries, 8, generator=generator)
    key, value = (torch.randn(batch, kv_heads, tokens, 8, generator=generator) for _ in range(2))
    mask = torch.rand(batch, 1, queries, tokens, generator=generator) < 0.6
    mask[..., 0] = True  # every query sees something
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal, module.training = group, True, False
    expected, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=0.3)
    found, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.is_contiguous()


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=None, **sizes, **heads)
    return LlamaForCausalLM(config).eval()


def draw(model: LlamaForCausalLM, **options) -> torch.Tensor:
    prompt = torch.tensor([[0, 1, 5, 9], [3, 1, 7, 2]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    given = {"attention_mask": mask, "custom_generate": tersor.zipar, "do_sample": False, "max_new_tokens": 30}
    return model.generate(prompt, grid_size=(5, 6), window_size=2, **given, **options)


def test_zipar_uses_it_and_draws_the_same(model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(*args, **kwargs):
        calls.append(args[1].shape[2])
        return grouped_attention(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, NAME, spy)
    ours = draw(model)
    assert max(calls) > 1
    monkeypatch.setattr(attention, "NAME", "sdpa")
    assert torch.equal(ours, draw(model))


def test_a_view_shares_weights_and_hooks_and_leaves_the_model_as_it_was(model) -> None:
    seen = []
    model.model.layers[0].self_attn.register_forward_hook(lambda module, *_: seen.append(module))
    before = dict(model.named_modules())
    own = with_grouped_attention(model)
    attention, theirs = own.model.layers[0].self_attn, model.model.layers[0].self_attn
    assert attention.config._attn_implementation == NAME
    assert {module.config._attn_implementation for module in before.values() if hasattr(module, "config")} == {"sdpa"}
    assert dict(model.named_modules()) == before
    assert [*map(id, own.parameters())] == [*map(id, model.parameters())]
    assert attention.q_proj is theirs.q_proj  # nothing differs there
    own(torch.tensor([[1, 2]]))
    assert seen == [attention]


def test_there_is_a_view_only_where_it_helps(model) -> None:
    model.set_attn_implementation("eager")
    assert with_grouped_attention(model) is model
    alone = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "num_key_value_heads": 4}))
    assert with_grouped_attention(alone) is alone


def test_images_and_texts_may_be_made_at_once(model) -> None:
    """While images are made by groups, texts go through the library's own attention."""
    text = {"input_ids": torch.tensor([[1, 4, 9, 2]]), "do_sample": False, "max_new_tokens": 20}
    alone = draw(model), model.generate(**text)
    names: set[str] = set()

    def watch(module, *_) -> None:
        names.add(module.config._attn_implementation)

    model.model.layers[1].self_attn.register_forward_hook(watch)
    with ThreadPoolExecutor(4) as pool:
        jobs = [(pool.submit(draw, model), pool.submit(model.generate, **text)) for _ in range(6)]
        for images, texts in jobs:
            assert torch.equal(images.result(), alone[0]) and torch.equal(texts.result(), alone[1])
    assert names == {NAME, "sdpa"}

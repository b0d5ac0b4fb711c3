"""A later part of a conversation through a sparse prefill: a picture in the second turn is read as one in the first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kv_driver import SCALE, SPARSE_MODULE, kept_rows, naive, uneven
from tiny_models import build, model, prompt, question
from torch import Tensor

from tersor._compat import with_cache
from tersor.kv.engine.attention import tersor_attention
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.engine.state import STATE, ForwardState
from tersor.kv.zipvl import ZipVL

FIRST, PART = 30, 45
CAUSAL = torch.ones(FIRST + PART, FIRST + PART, dtype=torch.bool).tril()[None, None]


def two_parts(recipe: ZipVL, qkv, mask: Tensor | None = None) -> tuple[Tensor, CompressedLayer, list[list[list[int]]]]:
    """A first prompt, then a part; returns the part's output, the layer, and what was kept of each."""
    method = recipe.method()
    layer, kept, output = CompressedLayer(method, 0), [], torch.empty(0)
    allowed = CAUSAL if mask is None else mask
    for start, stop in ((0, FIRST), (FIRST, FIRST + PART)):
        state = ForwardState(method, frozenset({0}))
        query, keys, values = (x[:, :, start:stop] for x in qkv)
        own = allowed[:, :, start:stop, :stop]
        keys, values = layer.update(keys, values)
        output, _ = tersor_attention(SPARSE_MODULE, query, keys, values, own, scaling=SCALE, **{STATE: state})
        kept.append(kept_rows(state))
    return output, layer, kept


@pytest.mark.parametrize("policy", ["evict", "keep"])
@pytest.mark.parametrize("mode", ["drop", "compute"])
def test_a_part_attends_to_what_is_stored_before_it_and_to_its_own_tokens(policy: str, mode: str) -> None:
    qkv = uneven(1, FIRST + PART)
    output, layer, kept = two_parts(ZipVL(tau=0.8, min_tokens=0, policy=policy, query_mode=mode), qkv)
    before, part = kept[0][0], [FIRST + i for i in kept[1][0]]
    assert 5 < len(part) < PART - 5
    stored = (before if policy == "evict" else list(range(FIRST))) + part
    rows = part if mode == "drop" else list(range(FIRST, FIRST + PART))
    expected = naive(qkv, stored, rows, CAUSAL[0, 0])[FIRST:]
    torch.testing.assert_close(output[0].double(), expected, atol=1e-5, rtol=1e-5)
    held = layer.dequantize()[2][0, 0].nonzero().flatten().tolist()
    assert held == (stored if policy == "evict" else list(range(FIRST + PART)))


def test_rows_of_a_batch_are_what_they_are_alone() -> None:
    qkv, pads = uneven(2, FIRST + PART), [0, 8]
    mask = CAUSAL.repeat(2, 1, 1, 1)
    for row, pad in enumerate(pads):
        mask[row, :, :, :pad] = False
    recipe = replace(ZipVL(tau=0.8, min_tokens=0), probe_random=0)
    together, layer, kept = two_parts(recipe, qkv, mask)
    for row in range(2):
        alone, own, own_kept = two_parts(recipe, tuple(x[row : row + 1] for x in qkv), mask[row : row + 1])
        assert own_kept[1][0] == kept[1][row]
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)
        stored = [each.dequantize()[2][at, 0] for each, at in ((layer, row), (own, 0))]
        assert torch.equal(stored[0], stored[1])


def test_tokens_that_waited_before_a_part_stay() -> None:
    """Generated tokens and short turns are no part of the choice."""
    net = build("llama")
    with ZipVL(tau=0.5, min_tokens=40).on(net) as session, torch.no_grad():
        net(prompt(1, 60))
        cache = session.cache
        physical = session.stats.physical_lengths
        net(prompt(1, 20, seed=2), **with_cache(cache))  # short: read whole
        assert session.stats.tokens == (60,)
        net(prompt(1, 50, seed=3), **with_cache(cache))
        stats = session.stats
    assert stats.tokens == (50,) and stats.token_ratio < 0.9
    kept = [len(own[0]) for own in stats.kept]
    assert stats.physical_lengths == tuple(a + 20 + b for a, b in zip(physical, kept, strict=True))


@pytest.mark.parametrize("policy", ["evict", "quantize", "keep"])
def test_a_part_with_tau_of_one_is_dense(policy: str) -> None:
    net = model("llama")
    ids = prompt(1, 110)
    with torch.no_grad():
        expected = net(ids).logits[:, 60:]
        with ZipVL(tau=1.0, min_tokens=0, policy=policy, high_bits=16, low_bits=16).on(net) as session:
            net(ids[:, :60])
            output = net(ids[:, 60:], **with_cache(session.cache)).logits
    torch.testing.assert_close(output, expected, atol=1e-3, rtol=1e-3)


def test_a_picture_in_the_second_turn_leaves_tokens_out() -> None:
    net = model("qwen2_5_vl")
    asked = question(net)
    first = prompt(1, 12, seed=9)
    with ZipVL(tau=0.5, min_tokens=10).on(net) as session, torch.no_grad():
        net(first, use_cache=True)
        cache, tokens = session.cache, asked["input_ids"].shape[1]
        places = torch.arange(12, 12 + tokens).expand(3, 1, -1)
        net(**{**asked, "attention_mask": torch.ones(1, 12 + tokens)}, position_ids=places, **with_cache(cache))
        assert session.stats.visual_ratio is not None and session.stats.visual_ratio < 0.95
        assert min(session.stats.physical_lengths) < tokens

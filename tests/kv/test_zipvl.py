"""ZipVL: the recipe, what its policies store, and how it goes on after the prompt."""

from __future__ import annotations

import math

import pytest
import torch
from kv_driver import (
    DIM,
    KV_HEADS,
    SCALE,
    SPARSE_MODULE,
    decode,
    kept_rows,
    naive,
    prefill,
    uneven,
)
from tiny_models import build, model, prompt

import tersor
from tersor._compat import with_cache
from tersor.kv.engine.attention import tersor_attention
from tersor.kv.engine.call import causal_rows
from tersor.kv.prefill.sparse import SparsePrefill
from tersor.kv.selection.ratio import RecentSelection
from tersor.kv.storage.mixed import MixedPrecisionStorage
from tersor.kv.zipvl import ZipVL
from tersor.lowbit.bytes import segment_bytes
from tersor.lowbit.kernels.probe_sums.reference import attention_rows

SPARSE = ZipVL(tau=0.8, min_tokens=0)


def test_decoding_reads_kept_and_generated_tokens() -> None:
    qkv = uneven(1, 60)
    _, layer, state = prefill(ZipVL(tau=0.8, min_tokens=0), tuple(x[:, :, :50] for x in qkv))
    kept = kept_rows(state)[0]
    outputs = decode(layer, qkv, 50, 60)
    assert layer.get_seq_length() == 60
    assert layer.get_mask_sizes(1) == (61, 0)
    for i, output in zip(range(50, 60), outputs, strict=True):
        allowed = torch.ones(60, 60, dtype=torch.bool).tril()
        expected = naive(qkv, [*kept, *range(50, i + 1)], [i], allowed)[i]
        torch.testing.assert_close(output[0, 0].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", ["evict", "keep"])
def test_generated_tokens_are_never_compressed(policy) -> None:
    qkv = uneven(1, 400)
    _, layer, _ = prefill(ZipVL(tau=0.8, min_tokens=0, policy=policy), tuple(x[:, :, :50] for x in qkv))
    decode(layer, qkv, 50, 400)
    assert layer.waiting == (350 if policy == "evict" else 400)
    assert len(layer.segments) == (1 if policy == "evict" else 0)


@pytest.mark.parametrize("policy", ["evict", "quantize", "keep"])
def test_a_later_chunk_is_dense_and_prunes_nothing(policy) -> None:
    qkv = uneven(1, 70)
    _, layer, state = prefill(
        ZipVL(tau=0.7, min_tokens=0, policy=policy, high_bits=16, low_bits=8), tuple(x[:, :, :40] for x in qkv)
    )
    query, keys, values = (x[:, :, 40:] for x in qkv)
    mask = causal_rows(30, 70, query.device)[:, None]
    output, _ = tersor_attention(SPARSE_MODULE, query, *layer.update(keys, values), mask, scaling=SCALE)
    old = kept_rows(state)[0] if policy == "evict" else list(range(40))
    expected = naive(qkv, [*old, *range(40, 70)], list(range(40, 70)), torch.ones(70, 70).tril().bool())[40:]
    tolerance = 2e-2 if policy == "quantize" else 1e-5
    torch.testing.assert_close(output[0].double(), expected, atol=tolerance, rtol=tolerance)
    assert len(kept_rows(state)[0]) < 40
    assert layer.waiting == (70 if policy == "keep" else 30)


@pytest.mark.parametrize("tau", [0.6, 0.9, 0.975])
def test_quantized_bytes_follow_the_ratio(tau: float) -> None:
    qkv = uneven(1, 2048, sharpness=3.0)
    _, layer, state = prefill(ZipVL(tau=tau, policy="quantize"), qkv)
    important = len(kept_rows(state)[0])
    shape = {"batch": 1, "kv_heads": KV_HEADS, "key_dim": DIM, "value_dim": DIM}
    stored = tersor.bench.measure.storage_bytes(layer.owned())
    assert stored == pytest.approx(segment_bytes([(important, 4), (2048 - important, 2)], **shape), rel=0.02)
    # Codes, and each token's minimum and step of its value and its position.
    ratio, numbers = important / 2048, 2 * KV_HEADS * DIM
    formula = (2 + 2 * ratio) / 16 + (2 * 2 + 4) / (2 * numbers)
    assert stored / (2 * numbers * 2048) == pytest.approx(formula, rel=0.05)


def test_important_tokens_are_stored_more_exactly() -> None:
    qkv = uneven(1, 300)
    _, layer, state = prefill(ZipVL(tau=0.8, policy="quantize", min_tokens=0), qkv)
    keys, values, present = layer.dequantize()
    assert present.all()
    important = torch.zeros(300, dtype=torch.bool)
    important[kept_rows(state)[0]] = True
    for exact, restored in zip(qkv[1:], (keys, values), strict=True):
        error = (exact - restored).abs().mean((0, 1, 3))
        assert error[important].mean() < error[~important].mean() / 2
    for group in layer.segments[0].groups:
        own = qkv[1].gather(2, group.positions.long()[..., None].expand(-1, KV_HEADS, -1, DIM))
        # Half a step, and what storing minimum and step in 16 bits moves.
        assert ((own - group.keys.decode()).abs() <= group.keys.step.float() * 0.5 + 0.01).all()


def test_new_tokens_are_compressed_every_hundred_by_the_mass_of_their_window() -> None:
    qkv = uneven(1, 460)
    _, layer, _ = prefill(ZipVL(tau=0.8, policy="quantize", min_tokens=0), tuple(x[:, :, :150] for x in qkv))
    first = layer.segments[0]
    for count in range(1, 311):
        decode(layer, qkv, 149 + count, 150 + count)
        assert len(layer.segments) == 1 + count // 100
        assert layer.waiting == count % 100
    assert layer.segments[0] is first
    assert [(each.start, each.length) for each in layer.segments] == [(0, 150), (150, 100), (250, 100), (350, 100)]
    # The last token's row, cut to the window and renormalized, holds tau on the tokens in four bits.
    query, keys = qkv[0][:, :, 249:250], qkv[1][:, :, 150:250]
    row = attention_rows(query, keys, torch.ones(1, 1, 100, dtype=torch.bool), scaling=SCALE).mean(1)[0, 0]
    high = (layer.segments[1].groups[0].positions[0, 0] - 150).tolist()
    # Weights by head are relative to the whole row, so the window's mean over heads differs from `row`; both hold tau.
    assert 0.5 < float(row[high].sum()) <= 1.0
    assert 0 < len(high) < 100
    assert 99 in high


def test_keep_leaves_every_token_as_it_was() -> None:
    qkv = uneven(2, 60)
    output, layer, state = prefill(ZipVL(tau=0.6, policy="keep", min_tokens=0), qkv)
    assert torch.equal(layer.keys, qkv[1])
    assert torch.equal(layer.values, qkv[2])
    assert torch.equal(output, prefill(ZipVL(tau=0.6, min_tokens=0), qkv)[0])
    assert len(kept_rows(state)[0]) < 60


BAD = {
    "tau": 0.0, "policy": "drop", "probe_recent": 0, "probe_random": -1,
    "protect": "image", "protect_recent": 0, "protect_first": -1, "query_mode": "skip", "skip_layers": (-1,),
    "min_tokens": -1, "high_bits": 5, "low_bits": 0, "recompress_every": 0, "param_dtype": "int8",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_values_out_of_range_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ZipVL(**{name: BAD[name]})
    with pytest.raises(ValueError, match="at least low_bits=4"):
        ZipVL(high_bits=2, low_bits=4)


@pytest.mark.parametrize("tau", [1.5, -0.1, math.nan, True])
def test_tau_is_a_share(tau) -> None:
    with pytest.raises(ValueError, match=r"tau=.* must be a share above 0 and at most 1"):
        ZipVL(tau=tau)


def test_defaults_are_the_papers() -> None:
    recipe = ZipVL()
    assert (recipe.tau, recipe.policy, recipe.probe_recent, recipe.probe_random) == (0.975, "evict", 64, 64)
    assert (recipe.high_bits, recipe.low_bits, recipe.recompress_every, recipe.min_tokens) == (4, 2, 100, 256)
    assert (recipe.query_mode, recipe.skip_layers, recipe.protect_recent, recipe.protect_first) == ("drop", (), 1, 0)
    assert ZipVL.from_json(ZipVL(tau=0.9, skip_layers=(0,)).to_json()) == ZipVL(tau=0.9, skip_layers=(0,))


def test_policies_pick_the_engines_parts() -> None:
    for policy in ("evict", "quantize", "keep"):
        method = ZipVL(policy=policy).method()
        assert isinstance(method.prefill, SparsePrefill)
        assert method.prefill.sparse
        assert (method.selection == method.prefill.selection) == (policy != "keep")
    assert method.selection == RecentSelection(ratio=1.0)
    assert not tersor.ZipCache().method().prefill.sparse


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "return sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams returned": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["gemma2"])
def test_every_way_of_generating_is_that_of_the_dense_model_at_tau_one(name: str, mode: str) -> None:
    net = model(name)
    ids = prompt(2, 50)
    mask = torch.ones_like(ids)
    mask[1, :21] = 0
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, **MODES[mode]}
    torch.manual_seed(1)
    expected = net.generate(ids, **options)
    for policy in ("evict", "keep"):
        with ZipVL(tau=1.0, min_tokens=0, policy=policy).on(net):
            torch.manual_seed(1)
            assert torch.equal(net.generate(ids, **options), expected)


@pytest.mark.parametrize("policy", ["evict", "quantize", "keep"])
def test_a_second_turn_goes_on_with_the_cache(policy) -> None:
    """The first prompt's choice stays, and the second prompt, which is short, is read whole."""
    net = model("llama")
    recipe = ZipVL(tau=0.8, min_tokens=40, policy=policy, high_bits=16, low_bits=16)
    with recipe.on(net) as session:
        cache = recipe.cache(net.config)
        first = net.generate(prompt(1, 60), **with_cache(cache), max_new_tokens=10, do_sample=False)
        kept, ratio = len(session.stats.kept[0][0]), session.stats.token_ratio
        physical = session.stats.physical_lengths[0]
        assert physical == (kept if policy == "evict" else 60) + 9
        longer = torch.cat([first, prompt(1, 30, seed=5)], dim=1)
        second = net.generate(longer, **with_cache(cache), max_new_tokens=10, do_sample=False)
        assert session.stats.token_ratio == ratio
    assert cache.get_seq_length() == 109
    assert session.stats.physical_lengths[0] == physical + 1 + 30 + 9
    # What it says is what the same steps say one by one.
    with recipe.on(net), torch.no_grad():
        fresh = recipe.cache(net.config)
        net(second[:, :60], **with_cache(fresh))
        logits = [net(second[:, i : i + 1], **with_cache(fresh)).logits for i in range(60, 109)]
    assert torch.cat(logits, 1)[0, 39:].argmax(-1).tolist() == second[0, 100:].tolist()


def test_a_short_prompt_is_quantized_like_generated_tokens() -> None:
    net = model("llama")
    for tokens, segments in ((150, 1), (60, 0)):
        with ZipVL(tau=0.8, policy="quantize").on(net) as session, torch.no_grad():
            first = net(prompt(1, tokens)).logits
            layer = session.cache.layers[0]
            assert len(layer.segments) == segments
            net.generate(prompt(1, tokens), max_new_tokens=102 - tokens if not segments else 2, do_sample=False)
            assert session.stats.skipped_reason == "short"
            assert len(session.cache.layers[0].segments) == 1
        torch.testing.assert_close(first, net(prompt(1, tokens)).logits)


def test_storage_of_evict_is_the_models_precision() -> None:
    net = build("llama", dtype=torch.bfloat16)
    assert SPARSE.method().storage == MixedPrecisionStorage(high_bits=16, low_bits=0)
    with SPARSE.on(net) as session, torch.no_grad():
        net.generate(prompt(2, 60), max_new_tokens=5, do_sample=False)
    group = session.cache.layers[0].segments[0].groups[0]
    assert group.keys.dtype == torch.bfloat16

"""Compositions: what works together, in either order, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import build, prompt

import tersor
from tersor import MiniCache, ZipCache, compose
from tersor.kv.compose import Composition
from tersor.kv.depth.pairs import MergedPairs, PairedLayer
from tersor.kv.prefill.sparse import SparsePrefill
from tersor.kv.selection.ratio import SaliencySelection
from tersor.kv.storage.mixed import MixedPrecisionStorage
from tersor.kv.zipvl import ZipVL

MINI = MiniCache(start_layer=0, max_relative_error=2.0)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def test_each_choice_comes_from_the_recipe_that_makes_it() -> None:
    zipcache = ZipCache(saliency_ratio=0.3, high_bits=8)
    for recipes in ((zipcache, MINI), (MINI, zipcache)):
        method = compose(*recipes).method()
        assert isinstance(method.selection, SaliencySelection)
        assert method.selection.ratio == 0.3
        assert method.storage == MixedPrecisionStorage(high_bits=8)
        assert method.depth == MINI.method().depth
        assert method.name == "zipcache+minicache"


def test_either_order_generates_the_same(llama) -> None:
    outputs = []
    for recipes in ((ZipCache(streaming_gap=16), MINI), (MINI, ZipCache(streaming_gap=16))):
        with compose(*recipes).on(llama) as session, torch.no_grad():
            outputs.append(llama.generate(prompt(2, 50), max_new_tokens=30, do_sample=False))
        widths = session.cache.summary()["tokens_by_width"]
        assert widths["4-bit"]
        assert widths["2-bit"]
        assert isinstance(session.cache.layers[1], PairedLayer)
    assert torch.equal(*outputs)


OTHER_PROBES = SaliencySelection(ratio=0.6, normalization="full_nnz", decode_probe="paper")


@pytest.mark.parametrize(
    "method",
    [
        compose(ZipCache(low_bits=0), MINI),
        compose(ZipCache(saliency_scope="kv_head", value_param_scope="token_head"), MINI),
        replace(compose(ZipCache(), MINI).method(), selection=OTHER_PROBES),
        compose(ZipCache(recent_fp_tokens=4, skip_layers=()), MINI),
    ],
    ids=["evict", "per head", "other probes", "recent"],
)
def test_variants_run_and_stay_finite(llama, method) -> None:
    with method.on(llama) as session, torch.no_grad():
        out = llama.generate(prompt(2, 50), max_new_tokens=120, do_sample=False, return_dict_in_generate=True,
                             output_logits=True)  # fmt: skip
    assert all(torch.isfinite(x).all() for x in out.logits)
    assert len(session.cache.layers[0].merged) == 2


def test_a_setting_left_at_its_default_gives_way() -> None:
    composed = compose(ZipCache(streaming_gap=40), MiniCache(recent_fp_tokens=8))
    method = composed.method()
    assert (method.streaming_gap, method.recent_fp_tokens, method.min_tokens_to_compress) == (40, 8, 32)
    assert compose(ZipCache(streaming_gap=40), MiniCache(streaming_gap=40)).method().streaming_gap == 40


REFUSED = {
    "one": ((ZipCache(),), ValueError, "at least two"),
    "none": ((), ValueError, "at least two"),
    "twice": ((MiniCache(), MiniCache(t=0.5)), ValueError, "MiniCache more than once"),
    "two storages": (
        (ZipCache(), MiniCache(bits=2)),
        ValueError,
        r"ZipCache \(by saliency_ratio\) and MiniCache \(by bits=2\) both choose the selection",
    ),
    "two gaps": (
        (ZipCache(streaming_gap=50), MiniCache(streaming_gap=32)),
        ValueError,
        "streaming_gap=50 by ZipCache and streaming_gap=32 by MiniCache",
    ),
    "two skips": ((ZipCache(skip_layers=(0,)), MiniCache(skip_layers=(1,))), ValueError, "skip_layers"),
    "heads and tokens": (
        (ZipCache(saliency_scope="kv_head", value_param_scope="token_head"), MiniCache(granularity="token")),
        ValueError,
        "granularity='token' keeps one length",
    ),
    "not a recipe": ((ZipCache(), "minicache"), TypeError, "got a str"),
    "a method": ((ZipCache(), MINI.method()), TypeError, "KVMethod"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused_by_name(name: str) -> None:
    recipes, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        compose(*recipes)


def test_nested_compositions_are_refused() -> None:
    with pytest.raises(TypeError, match="got a Composition"):
        compose(compose(ZipCache(), MiniCache()), MiniCache())


def test_composition_is_a_recipe(llama) -> None:
    composed = compose(ZipCache(saliency_ratio=0.5), MiniCache(pairs=((0, 1),)))
    assert isinstance(composed, Composition)
    assert composed.choices().keys() == {"selection", "storage", "depth"}
    assert Composition.from_json(composed.to_json()).method() == composed.method()
    with pytest.raises(ValueError, match="choose one of"):
        Composition.from_json('{"nocache": {}, "zipcache": {}}')
    assert isinstance(composed.cache(llama.config).layers[0], PairedLayer)
    assert isinstance(composed.method().depth, MergedPairs)
    assert "compose" in tersor.__all__


def test_compositions_prefill_sparsely_and_store_as_the_other_recipe_says() -> None:
    net = build("llama")
    for recipes, bits in (
        ((ZipVL(tau=0.8, min_tokens=0, policy="quantize"), MINI), {"4-bit", "2-bit"}),
        ((ZipVL(tau=0.8, min_tokens=0, policy="keep"), MINI), {"4-bit"}),
        ((ZipVL(tau=0.8, min_tokens=0, policy="keep"), ZipCache(saliency_ratio=0.5)), {"4-bit", "2-bit"}),
    ):
        outputs = []
        for ordered in (recipes, recipes[::-1]):
            method = compose(*ordered).method()
            assert isinstance(method.prefill, SparsePrefill)
            with method.on(net) as session, torch.no_grad():
                outputs.append(net.generate(prompt(2, 60), max_new_tokens=30, do_sample=False))
            widths = session.cache.summary()["tokens_by_width"]
            assert set(widths) - {"buffer"} == bits
            assert session.stats.token_ratio < 0.7
            assert isinstance(method.depth, MergedPairs) == (recipes[1] is MINI)
        assert torch.equal(*outputs)
    assert compose(ZipVL(policy="keep"), MINI).method().name == compose(MINI, ZipVL(policy="keep")).method().name


def test_contradicting_compositions_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"ZipVL \(by policy='evict'\) and ZipCache .* both choose the selection"):
        compose(ZipVL(), ZipCache())
    with pytest.raises(ValueError, match="evicts does not go with merged layers"):
        compose(ZipVL(), MINI)

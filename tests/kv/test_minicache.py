"""MiniCache on whole models: generation, which layers are paired, the similarity report, and the settings."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from tiny_models import NAMES, SHAPE, build, prompt
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, SmolLM3Config

from tersor.kv.depth.merging import MergeRule
from tersor.kv.depth.pairing import choose_pairs
from tersor.kv.depth.pairs import MergedPairs, PairedLayer
from tersor.kv.depth.similarity import PairSimilarity, SimilarityReport, analyze_layer_similarity
from tersor.kv.engine.cache import compressible_layers
from tersor.kv.engine.choices import pick
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.method import KVMethod
from tersor.kv.minicache import MiniCache
from tersor.kv.selection.ratio import RecentSelection, SaliencySelection
from tersor.kv.storage.mixed import MixedPrecisionStorage

SMALL = {"streaming_gap": 10, "min_tokens_to_compress": 8, "max_relative_error": 2.0}


def llama(layers: int, **settings) -> LlamaConfig:
    return LlamaConfig(**{**SHAPE, "num_hidden_layers": layers, **settings})


def alike(layers: int = 4, pairs: tuple[int, ...] = (0, 2)) -> LlamaForCausalLM:
    """A model whose layers ``i`` and ``i + 1`` cache nearly the same, for ``i`` in ``pairs``."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama(layers, initializer_range=0.02)).eval()
    with torch.no_grad():
        for first in pairs:
            one, other = model.model.layers[first], model.model.layers[first + 1]
            for name in ("k_proj", "v_proj"):
                getattr(other.self_attn, name).weight.copy_(1.5 * getattr(one.self_attn, name).weight)
            # What a layer adds stays small, so that the next one reads nearly the same.
            one.self_attn.o_proj.weight.mul_(0.1)
            one.mlp.down_proj.weight.mul_(0.1)
    return model


def test_a_cache_counts_shared_storage_once_and_saves_it_once() -> None:
    model = build("llama")
    recipe = MiniCache(**SMALL, start_layer=0)
    with recipe.on(model) as session, torch.no_grad():
        model.generate(prompt(2, 60), max_new_tokens=14, do_sample=False)
    cache = session.cache
    assert cache is not None
    (row,) = cache.summary()["pairs"]
    assert cache.memory_footprint() == sum(row["bytes"].values())
    named = cache.state_dict()
    pointers = [x.data_ptr() for x in named.values() if x.numel()]
    assert len(set(pointers)) == len(pointers)
    assert row["layers"] == [0, 1]
    assert 0 < row["retained"] <= 0.1
    before = cache.memory_footprint()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.memory_footprint() == before
    clone = copy.deepcopy(cache)
    assert clone.memory_footprint() == before
    assert clone.layers[0].mate is clone.layers[1]


# -- invariant 8: every way of generating ------------------------------------------------------------------------------

LOSSLESS = {
    "everything retained": MiniCache(**{**SMALL, "streaming_gap": 16}, start_layer=0, gamma=1.0, bits=16),
    "no pairs": MiniCache(**{**SMALL, "streaming_gap": 16}, pairs=(), bits=16),
}
MODES = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "return sequences": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "chunked prefill": {"prefill_chunk_size": 13},
}
PAIRED_MODELS = [name for name in NAMES if name not in ("mistral_sliding", "gemma2", "gemma3")]


def generate(model, mode: str) -> list[list[int]]:
    torch.manual_seed(3)
    ids = prompt(2, 40)
    mask = torch.ones_like(ids)
    if mode in ("prompt lookup", "chunked prefill"):
        ids, mask = ids[:1].repeat(1, 2), torch.ones(1, 80, dtype=torch.int64)
    else:
        mask[1, :15] = 0
    options = {"do_sample": False, **MODES[mode]}
    return model.generate(ids, attention_mask=mask, max_new_tokens=24, **options).tolist()


@pytest.mark.parametrize("mode", MODES)
def test_lossless_settings_generate_the_same_tokens(mode: str) -> None:
    model = build("llama")
    expected = generate(model, mode)
    for recipe in LOSSLESS.values():
        with recipe.on(model) as session:
            assert generate(model, mode) == expected
        assert len(session.cache.layers[0].segments) >= 2


@pytest.mark.parametrize("name", PAIRED_MODELS)
def test_every_class_of_model(name: str) -> None:
    model = build(name)
    expected = generate(model, "greedy")
    with LOSSLESS["everything retained"].on(model):
        assert generate(model, "greedy") == expected
    with MiniCache(**SMALL, start_layer=0).on(model) as session:
        generate(model, "beam")
        assert isinstance(session.cache.layers[0], PairedLayer)


def test_two_turns_with_one_cache() -> None:
    model, recipe = build("llama"), LOSSLESS["everything retained"]

    def turns(cache) -> list[int]:
        first = model.generate(prompt(1, 45), past_key_values=cache, max_new_tokens=20, do_sample=False)
        second = torch.cat([first, prompt(1, 30, seed=5)], dim=1)
        return model.generate(second, past_key_values=cache, max_new_tokens=20, do_sample=False).tolist()

    expected = turns(DynamicCache(config=model.config))
    with recipe.on(model):
        assert turns(recipe.cache(model.config)) == expected


# -- which layers are paired ---------------------------------------------------------------------------------------


def paired(config, **settings) -> list[tuple[int, int]]:
    return choose_pairs(compressible_layers(config), config, **settings)


@pytest.mark.parametrize(
    ("layers", "start", "expected"),
    [
        (8, 0.5, [(4, 5), (6, 7)]),
        (7, 0.5, [(3, 4), (5, 6)]),
        (9, 0.5, [(4, 5), (6, 7)]),
        (6, 3, [(3, 4)]),
        (4, 0, [(0, 1), (2, 3)]),
    ],
)
def test_pairs_from_the_start_layer_on(layers: int, start: float, expected: list) -> None:
    assert paired(llama(layers), start_layer=start) == expected


def test_skipped_layers_are_never_paired() -> None:
    config = llama(8)
    assert choose_pairs(compressible_layers(config, (5,)), config, start_layer=0.5) == [(6, 7)]
    layers = MiniCache(start_layer=0, skip_layers=(1,)).cache(llama(4)).layers
    assert [type(layer) for layer in layers] == [CompressedLayer, type(layers[1]), PairedLayer, PairedLayer]


def test_layers_that_rotate_differently_are_never_paired() -> None:
    """SmolLM3: every fourth layer has no rotary positions."""
    config = SmolLM3Config(**{**SHAPE, "num_hidden_layers": 8}, no_rope_layers=[1, 1, 1, 0, 1, 1, 1, 0])
    assert paired(config, start_layer=2) == [(4, 5)]
    with pytest.raises(ValueError, match="3 and 4: they differ in rotary positions"):
        paired(SmolLM3Config(**{**SHAPE, "num_hidden_layers": 5}, no_rope_layers=[1, 1, 1, 0, 1]), start_layer=3)


def test_sliding_layers_are_never_paired() -> None:
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**{**SHAPE, "num_hidden_layers": 4}, head_dim=8, sliding_window=24, layer_types=types)
    assert paired(config, start_layer=0) == [(1, 2)]


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_no_valid_pair_says_why(name: str) -> None:
    model = build(name)
    with pytest.raises(ValueError, match=r"0 and 1: layer 0 is sliding_attention.*'full_attention'\]"):
        MiniCache(start_layer=0).on(model).enable()
    assert model.config._attn_implementation != "tersor"
    with pytest.raises(ValueError, match="could be merged"):
        analyze_layer_similarity(model, prompt(1, 10))
    with pytest.raises(ValueError, match="fewer than two"):
        MiniCache(start_layer=7).cache(llama(8))


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        (((0, 1), (1, 2)), "another pair"),
        (((0, 2),), r"layer i and layer i \+ 1"),
        (((3, 4),), "among layers 0 to 3"),
        (((1, 0),), r"layer i and layer i \+ 1"),
    ],
)
def test_wrong_pairs_are_refused(pairs: tuple, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        MiniCache(pairs=pairs).cache(llama(4))


def test_one_length_a_token_needs_one_choice_of_tokens() -> None:
    with pytest.raises(ValueError, match="use granularity='head'"):
        KVMethod(
            selection=SaliencySelection(ratio=0.5, scope="kv_head"),
            storage=MixedPrecisionStorage(value_param_scope="token_head"),
            depth=MergedPairs(granularity="token"),
        )


# -- measured similarity -------------------------------------------------------------------------------------------


def test_the_report_finds_the_layers_that_are_alike() -> None:
    model = alike()
    report = analyze_layer_similarity(model, prompt(2, 60))
    errors = report.errors()
    assert set(errors) == {(0, 1), (1, 2), (2, 3)}
    assert max(errors[0, 1], errors[2, 3]) < 0.2 < errors[1, 2]
    assert report.pairs() == ((0, 1), (2, 3))
    assert "predicted error" in str(report)
    assert len(str(report).splitlines()) == 7


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_the_report_predicts_what_merging_finds(granularity: str) -> None:
    model = alike()
    settings = {"start_layer": 0, "bits": 16, "granularity": granularity, "min_tokens_to_compress": 8}
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[1, :20] = 0
    recipe = MiniCache(**settings)
    report = analyze_layer_similarity(model, prompt(2, 60), attention_mask=mask, rule=pick(MergeRule, recipe))
    cache = recipe.cache(model.config)
    with recipe.on(model), torch.no_grad():
        model(prompt(2, 60), attention_mask=mask, past_key_values=cache)
    for row in cache.summary()["pairs"]:
        layers = tuple(row["layers"])
        own = [each for each in report.rows if each.layers == layers]
        assert row["predicted_error"] == pytest.approx(report.errors()[layers], rel=1e-4)
        assert row["mean_cosine"] == pytest.approx(sum(each.mean_cosine for each in own) / 2, rel=1e-4)
        assert row["retained"] == pytest.approx(own[0].retained)


def report_of(errors: dict[tuple[int, int], float]) -> SimilarityReport:
    return SimilarityReport(
        tuple(
            PairSimilarity(pair, kind, 0.9, 0.9, 0.1, 0.05, error)  # type: ignore[arg-type]
            for pair, error in errors.items()
            for kind in ("keys", "values")
        )
    )


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        # The best pair of all stands in the way of two good ones.
        ({(0, 1): 0.3, (1, 2): 0.1, (2, 3): 0.3}, ((0, 1), (2, 3))),
        # Of equally many, those of least error.
        ({(0, 1): 0.3, (1, 2): 0.1}, ((1, 2),)),
        ({(0, 1): 0.2, (1, 2): 0.9, (2, 3): 0.4, (5, 6): 0.34}, ((0, 1), (5, 6))),
    ],
)
def test_pairs_are_as_many_as_fit_below_the_limit(errors: dict, expected: tuple) -> None:
    assert report_of(errors).pairs(0.35) == expected


def test_auto_picks_pairs_or_prints_the_table() -> None:
    recipe = MiniCache.auto(alike(), prompt(1, 60), gamma=0.1)
    assert recipe.pairs == ((0, 1), (2, 3))
    assert recipe.gamma == 0.1
    assert MiniCache.auto(alike(), prompt(1, 60), skip_layers=(0,)).pairs == ((2, 3),)
    with pytest.raises(ValueError, match=r"(?s)below a relative error of 0\.0001.*mean cosine.*1, 2"):
        MiniCache.auto(alike(), prompt(1, 60), max_relative_error=1e-4)


def run(model, recipe: MiniCache) -> None:
    with recipe.on(model), torch.no_grad():
        model.generate(prompt(1, 60), max_new_tokens=30, do_sample=False)


def test_dissimilar_layers_warn_once_with_the_table() -> None:
    model = alike(pairs=(0,))
    settings = {"start_layer": 0, "streaming_gap": 10}
    with pytest.warns(UserWarning, match=r"(?s)MiniCache\.auto.*mean cosine.*\n0, 1 .*\n2, 3 ") as seen:
        run(model, MiniCache(**settings))
    assert len(seen) == 1
    with pytest.raises(ValueError, match=r"max_relative_error=0\.35"):
        run(model, MiniCache(**settings, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, MiniCache(**settings, pairs=((0, 1),), strict=True))


# -- the recipe ----------------------------------------------------------------------------------------------------

BAD = {
    "start_layer": [-1, 1.0, "auto", True],
    "pairs": [((0, 1, 2),), ((-1, 0),)],
    "t": [1.5],
    "gamma": [-0.1],
    "retention": ["nearest"],
    "granularity": ["layer"],
    "max_retained_fraction": [2.0],
    "max_relative_error": [0.0],
    "bits": [5, 0],
    "param_dtype": ["int8"],
    "streaming_gap": [0],
    "skip_layers": [(-1,)],
}


@pytest.mark.parametrize("name", BAD)
def test_values_out_of_range_are_named(name: str) -> None:
    for value in BAD[name]:
        with pytest.raises(ValueError, match=name):
            MiniCache(**{name: value})


def test_defaults_are_the_papers() -> None:
    recipe = MiniCache()
    assert (recipe.start_layer, recipe.t, recipe.gamma) == (0.5, 0.6, 0.05)
    assert recipe.method().storage == MixedPrecisionStorage(high_bits=4)


def test_json_round_trip() -> None:
    recipe = MiniCache(pairs=((2, 3), (6, 7)), bits=2, granularity="token", skip_layers=(0,))
    assert MiniCache.from_json(recipe.to_json()) == recipe
    assert json.loads(recipe.to_json())["pairs"] == [[2, 3], [6, 7]]


def test_nominal_ratios_are_the_published_ones() -> None:
    h = 4096
    assert MiniCache(gamma=0.0).nominal_compression_ratio(count_lengths=False) == pytest.approx(5.02, abs=5e-3)
    raw = {"bits": 16, "granularity": "token"}
    assert MiniCache(**raw, gamma=0.0).nominal_compression_ratio() == pytest.approx(4 * h / (3 * h + 2))
    assert MiniCache(**raw).nominal_compression_ratio() == pytest.approx(4 * h / (3.1 * h + 2))
    # A length a head costs a quarter of a bit per shared number and layer.
    assert MiniCache(bits=16, gamma=0.0).nominal_compression_ratio() == pytest.approx(16 / (12 + 0.5 * 16 / 128))
    assert MiniCache(pairs=((0, 1),), **raw, gamma=0.0).nominal_compression_ratio(layers=8) < 4 / 3.4


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

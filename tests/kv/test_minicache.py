"""MiniCache: the recipe, and every class of model."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import NAMES, alike, build, prompt

from tersor.kv.depth.pairs import PairedLayer
from tersor.kv.minicache import MiniCache
from tersor.kv.storage.mixed import MixedPrecisionStorage

SMALL = {"streaming_gap": 10, "min_tokens_to_compress": 8, "max_relative_error": 2.0}


PAIRED_MODELS = [name for name in NAMES if name not in ("gemma2", "gemma3")]


def generate(model, **options) -> list[list[int]]:
    ids = prompt(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :15] = 0
    return model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, **options).tolist()


@pytest.mark.parametrize("name", PAIRED_MODELS)
def test_every_class_of_model(name: str) -> None:
    model = build(name)
    expected = generate(model)
    with MiniCache(**SMALL, start_layer=0, gamma=1.0, bits=16).on(model):
        assert generate(model) == expected
    with MiniCache(**SMALL, start_layer=0).on(model) as session:
        generate(model, num_beams=3)
        assert isinstance(session.cache.layers[0], PairedLayer)


def test_auto_picks_pairs_or_prints_the_table() -> None:
    recipe = MiniCache.auto(alike(), prompt(1, 60), gamma=0.1)
    assert recipe.pairs == ((0, 1), (2, 3))
    assert recipe.gamma == 0.1
    assert MiniCache.auto(alike(), prompt(1, 60), skip_layers=(0,)).pairs == ((2, 3),)
    with pytest.raises(ValueError, match=r"(?s)below a relative error of 0\.0001.*mean cosine.*1, 2"):
        MiniCache.auto(alike(), prompt(1, 60), max_relative_error=1e-4)


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

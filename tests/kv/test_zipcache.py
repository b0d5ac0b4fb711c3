"""The recipe's settings: the paper's defaults, validation, round trip."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build, prompt

from tersor._compat import with_cache
from tersor.kv.zipcache import ZipCache

BAD = {
    "high_bits": 5,
    "low_bits": 5,
    "saliency_ratio": 1.5,
    "probe_recent_ratio": -0.1,
    "probe_random_ratio": 2,
    "streaming_gap": 0,
    "recent_fp_tokens": -1,
    "min_tokens_to_compress": 0,
    "saliency_scope": "model",
    "value_param_scope": "channel",
    "param_dtype": "int8",
    "max_probe_tokens": 0,
    "skip_layers": (-1,),
}


@pytest.mark.parametrize("name", BAD)
def test_values_out_of_range_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ZipCache(**{name: BAD[name]})


def test_contradictions_are_explained() -> None:
    with pytest.raises(ValueError, match="token_head"):
        ZipCache(saliency_scope="kv_head")
    with pytest.raises(ValueError, match="at least low_bits=4"):
        ZipCache(high_bits=2, low_bits=4)


def test_defaults_are_the_papers() -> None:
    recipe = ZipCache()
    assert (recipe.high_bits, recipe.low_bits, recipe.saliency_ratio, recipe.streaming_gap) == (
        4,
        2,
        0.6,
        100,
    )
    assert (recipe.probe_recent_ratio, recipe.probe_random_ratio) == (0.05, 0.05)


def test_json_round_trip() -> None:
    recipe = ZipCache(saliency_ratio=0.4, skip_layers=(0, 3), max_probe_tokens=64)
    assert ZipCache.from_json(recipe.to_json()) == recipe
    with pytest.raises(ValueError, match="has no settings"):
        ZipCache.from_json('{"ratio": 0.5}')


def test_settings_are_frozen_and_keyword_only() -> None:
    with pytest.raises(AttributeError):
        ZipCache().high_bits = 8  # type: ignore[misc]
    with pytest.raises(TypeError):
        ZipCache(0.5)  # type: ignore[misc]


def test_values_may_have_their_own_width() -> None:
    model = build("llama")
    recipe = ZipCache(saliency_ratio=0.5, value_high_bits=2, value_low_bits=3, min_tokens_to_compress=8)
    with recipe.on(model), torch.no_grad():
        cache = recipe.cache(model.config)
        model(prompt(1, 20), **with_cache(cache))
    high, low = cache.layers[0].segments[0].groups
    assert (high.keys.bits, high.values.bits, low.keys.bits, low.values.bits) == (4, 2, 2, 3)
    assert recipe.nominal_compression_ratio() == pytest.approx(16 / (0.5 * 3 + 0.5 * 2.5), rel=0.02)
    with pytest.raises(ValueError, match="value_low_bits"):
        ZipCache(low_bits=0, value_low_bits=2)
    with pytest.raises(ValueError, match="value_high_bits"):
        ZipCache(value_high_bits=16)

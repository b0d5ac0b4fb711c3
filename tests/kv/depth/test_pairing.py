"""Which neighbouring layers are paired, and why others are not."""

from __future__ import annotations

import pytest
from tiny_models import SHAPE, build, prompt
from transformers import Gemma3TextConfig, LlamaConfig, SmolLM3Config

from tersor.kv.depth.pairing import choose_pairs
from tersor.kv.depth.pairs import PairedLayer
from tersor.kv.depth.similarity import analyze_layer_similarity
from tersor.kv.engine.cache import compressible_layers
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.minicache import MiniCache


def llama(layers: int, **settings) -> LlamaConfig:
    return LlamaConfig(**{**SHAPE, "num_hidden_layers": layers, **settings})


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

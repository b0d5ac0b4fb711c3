"""Choices: when tokens are compressed, which options are refused, and that settings need no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from kv_driver import feed, step, stream

from tersor import ZipCache
from tersor.kv.engine.choices import Choices, pick
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.selection.ratio import RecentSelection, SaliencySelection
from tersor.kv.storage.mixed import MixedPrecisionStorage


def choices(**options) -> Choices:
    return Choices(selection=RecentSelection(ratio=0.5), storage=MixedPrecisionStorage(), **options)


def test_thresholds_are_reached_at_their_number_and_none_never() -> None:
    own = choices(streaming_gap=10, min_tokens_to_compress=8)
    assert [own.fills_gap(tokens) for tokens in (9, 10, 11)] == [False, True, True]
    assert [own.fills_prompt(tokens) for tokens in (7, 8)] == [False, True]
    never = choices(streaming_gap=None, min_tokens_to_compress=None)
    assert not never.fills_gap(10**9)
    assert not never.fills_prompt(10**9)


def test_a_layer_that_never_compresses_keeps_every_token() -> None:
    tensors = stream(1, 60)
    layer = CompressedLayer(choices(streaming_gap=None, min_tokens_to_compress=None), 0)
    step(layer, *(x[:, :, :40] for x in tensors))
    feed(layer, tensors, 40, 60)
    assert layer.waiting == 60
    assert not layer.segments


@pytest.mark.parametrize(
    "options",
    [
        {"streaming_gap": 0},
        {"streaming_gap": True},
        {"recent_fp_tokens": -1},
        {"recent_fp_tokens": None},
        {"min_tokens_to_compress": 0},
        {"skip_layers": (-1,)},
    ],
)
def test_options_out_of_range_are_named(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        choices(**options)


def test_a_part_takes_the_settings_that_have_its_names() -> None:
    recipe = ZipCache(high_bits=8, seed=3, saliency_ratio=0.4)
    assert pick(MixedPrecisionStorage, recipe) == MixedPrecisionStorage(high_bits=8)
    assert pick(SaliencySelection, recipe, ratio=0.4) == SaliencySelection(ratio=0.4, seed=3)


def test_settings_are_checked_without_loading_torch() -> None:
    code = (
        "import sys, tersor, tersor.kv.engine.choices\n"
        "for recipe in (tersor.ZipCache(), tersor.MiniCache(), tersor.ZipVL()): recipe.to_json()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

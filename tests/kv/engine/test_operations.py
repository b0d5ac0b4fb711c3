"""What a decoding step costs on the host: few operations more than the library's cache, at any length."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from operations import LAYERS, decoding_steps, prefill

import tersor
from tersor.kv.recipe import Recipe

GAP, STEPS = 20, 45
#: Operations of a full window where the number of tokens of each kind is not known beforehand.
FLUSH = {"minicache": 500, "compose": 560, "zipvl quantize": 260}
RECIPES: dict[str, Recipe] = {
    "uniform": tersor.ZipCache(saliency_ratio=1.0, streaming_gap=GAP),
    "zipcache": tersor.ZipCache(streaming_gap=GAP),
    "zipcache 3 bits": tersor.ZipCache(streaming_gap=GAP, high_bits=3, low_bits=3),
    "zipcache by head": tersor.ZipCache(streaming_gap=GAP, saliency_scope="kv_head", value_param_scope="token_head"),
    "minicache": tersor.MiniCache(streaming_gap=GAP, start_layer=0, max_relative_error=2.0),
    "compose": tersor.compose(
        tersor.MiniCache(streaming_gap=GAP, start_layer=0, max_relative_error=2.0), tersor.ZipCache(streaming_gap=GAP)
    ),
    "zipvl evict": tersor.ZipVL(min_tokens=8),
    "zipvl quantize": tersor.ZipVL(min_tokens=8, policy="quantize", recompress_every=GAP),
}


@cache
def library(batch: int, kind: str = "llama"):
    return decoding_steps(None, 3, batch=batch, kind=kind)[-1]


def flushes(name: str) -> list[int]:
    """Steps at which the window is full."""
    return [] if name == "zipvl evict" else [step for step in range(STEPS) if (step + 1) % GAP == 0]


@pytest.mark.parametrize(
    ("name", "batch"),
    [*((name, 1) for name in RECIPES), *((name, 4) for name in ("uniform", "zipcache", "compose", "zipvl quantize"))],
)
def test_a_step_dispatches_at_most_eight_operations_a_layer_more(name: str, batch: int) -> None:
    """At the start and after several segments alike, and without waiting for the device."""
    steps = decoding_steps(RECIPES[name], STEPS, batch=batch)
    full = flushes(name)
    plain = [each for step, each in enumerate(steps) if step not in full]
    # An unlimited window grows by some slots now and then, which is no step's usual cost.
    early, late = (min(steps[i : i + 3], key=lambda each: each.a_layer) for i in (9, STEPS - 3))
    assert late.a_layer <= library(batch).a_layer + 8
    assert early.a_layer == late.a_layer
    assert all(each.read_backs == library(batch).read_backs for each in plain)
    # A full window takes a fixed number of operations, not some for every waiting token.
    for step in full:
        assert steps[step].a_layer - late.a_layer <= FLUSH.get(name, 120 if batch == 1 else 190)
        # How many tokens matter there, or are too different to merge, has to be read back.
        assert name in FLUSH or steps[step].read_backs == library(batch).read_backs


def test_a_key_bias_costs_one_read_back_a_step_and_few_operations() -> None:
    recipe = tersor.ZipCache(streaming_gap=GAP, subtract_key_bias=True)
    steps = decoding_steps(recipe, STEPS, kind="qwen2")
    assert steps[10].a_layer == steps[-1].a_layer <= library(1, "qwen2").a_layer + 16
    assert {each.read_backs for each in steps[1:]} == {1}


def test_the_count_catches_a_window_that_is_concatenated(monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.kv.engine.buffer import Buffer

    def concatenate(self: Buffer, keys, values, window: int) -> None:
        held = (self.keys, self.values) if self.slots else (keys[:, :, :0], values[:, :, :0])
        self.slots = tuple(torch.cat([old, new], 2).clone() for old, new in zip(held, (keys, values), strict=True))
        self.tokens += keys.shape[2]

    monkeypatch.setattr(Buffer, "append", concatenate)
    with pytest.raises(AssertionError):
        test_a_step_dispatches_at_most_eight_operations_a_layer_more("zipcache", 1)


@pytest.mark.parametrize(("policy", "read_backs"), [("evict", 1), ("keep", 1), ("quantize", 2)])
def test_a_sparse_prefill_waits_once_a_layer_for_the_number_of_tokens(policy: str, read_backs: int) -> None:
    """With codes to store, once more for their parameters' precision."""
    counted = prefill(tersor.ZipVL(min_tokens=8, tau=0.9, policy=policy))
    assert counted.read_backs - prefill(None).read_backs == read_backs * LAYERS
    assert policy == "quantize" or counted.launches_a_layer <= 80


def test_a_padded_batch_waits_a_few_times_more_and_not_in_every_layer() -> None:
    counted = prefill(tersor.ZipVL(min_tokens=8, tau=0.9), batch=3)
    assert counted.read_backs - prefill(None, batch=3).read_backs <= LAYERS + 4


def test_the_count_catches_a_prefill_that_looks_at_its_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.kv.selection.mass import MassSelection

    choose = MassSelection.choose

    def looking(self: MassSelection, waiting):
        assert waiting.scores.sums is not None and float(waiting.scores.sums.sum()) > 0
        return choose(self, waiting)

    monkeypatch.setattr(MassSelection, "choose", looking)
    with pytest.raises(AssertionError):
        test_a_sparse_prefill_waits_once_a_layer_for_the_number_of_tokens("evict", 1)

"""Batches whose images are decoded each at its own pace: the same images as in lock-step, in fewer passes."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tersor._compat import with_cache
from tersor.grids.speculative import paces
from tersor.grids.speculative.paces import OwnPaces

pytestmark = pytest.mark.usefixtures("poison_empty")
SAMPLED = {"do_sample": True, "temperature": 1.5, "window_size": 6}


def generators(images: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(images)]


@pytest.fixture
def in_lock_step(monkeypatch: pytest.MonkeyPatch):
    """Runs a call in lock-step."""

    def run(function, *args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(OwnPaces, "takes", lambda *_: False)
            return function(*args, **options)

    return run


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_batch_takes_the_passes_of_its_slowest_image(case, guidance, in_lock_step) -> None:
    inputs = case.inputs(5, case.pads)
    out = case.speculative(inputs, guidance, generator=generators(5), **SAMPLED)
    waited = in_lock_step(case.speculative, inputs, guidance, generator=generators(5), **SAMPLED)
    assert torch.equal(out.sequences, waited.sequences)
    assert out.forward_passes <= waited.forward_passes and out.fed_tokens <= waited.fed_tokens
    alone = []
    for number, generator in enumerate(generators(5)):
        own = {name: value[number : number + 1] for name, value in inputs.items()}
        alone.append(case.speculative(own, guidance, generator=generator, **SAMPLED))
    assert out.forward_passes == max(each.forward_passes for each in alone)
    mean = torch.tensor([each.acceptance for each in alone]).mean(0)
    torch.testing.assert_close(torch.tensor(out.acceptance), mean)
    assert out.fed_tokens >= sum(each.fed_tokens for each in alone) // 5, "shorter windows are filled up"
    assert sum(out.cells_per_pass) == case.grid[0] * case.grid[1] and min(out.cells_per_pass) > 0
    starts = [each.row_start_pass for each in alone]
    assert out.row_start_pass == torch.tensor(starts).amax(0).tolist(), "when the last image began the row"


def test_fast_images_wait_where_their_noise_would_take_too_much_memory(cases, monkeypatch, in_lock_step) -> None:
    case = cases("llamagen_class")
    inputs = {"class_labels": torch.arange(8) % 5}
    held = []
    honest = paces.OwnPaces._test

    def test(self, rows, steps, cells):
        held.append(len(self.draws.noise))
        return honest(self, rows, steps, cells)

    monkeypatch.setattr(paces.OwnPaces, "_test", test)
    expected = in_lock_step(case.speculative, inputs, generator=torch.Generator().manual_seed(3), **SAMPLED)
    for most in (1, 1 << 24):
        monkeypatch.setattr(paces, "_MOST_NOISE", most)
        held.clear()
        out = case.speculative(inputs, generator=torch.Generator().manual_seed(3), **SAMPLED)
        assert torch.equal(out.sequences, expected.sequences)
        assert (max(held) <= 6) == (most == 1), "with 1 as much as one window"


@pytest.mark.parametrize("name", ["llama", "llama_eol", "emu3"])
def test_the_callers_cache_holds_what_token_by_token_leaves(cases, name) -> None:
    case, caches = cases(name), (DynamicCache(), DynamicCache())
    inputs = case.inputs(4, True)
    for cache, window in zip(caches, (6, 1), strict=True):
        options = {**SAMPLED, "window_size": window, **with_cache(cache)}
        out = case.speculative(inputs, 1.0, generator=generators(4), **options)
        assert out.forward_passes < 20 or window == 1
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.values, other.values, atol=1e-5, rtol=1e-4)


LOCK_STEP = {
    "ids": {"repetition_penalty": 1.2},
    "scores that are returned": {"output_scores": True},
    "a law of the neighbour": {"first_drafts": "law left"},
    "a law": {"mode": "law"},
    "guidance that ends": {"cfg_interval": 3, "guidance_scale": 2.0},
}


@pytest.mark.parametrize("options", LOCK_STEP.values(), ids=LOCK_STEP)
def test_what_reads_across_images_is_decoded_in_lock_step(cases, monkeypatch, options) -> None:
    case = cases("llama")
    monkeypatch.setattr(OwnPaces, "run", lambda self: pytest.fail("not in lock-step"))
    guidance = options.get("guidance_scale", 1.0)
    assert case.speculative(case.inputs(3, False), guidance, **{**SAMPLED, **options}).sequences is not None
    with pytest.raises(pytest.fail.Exception, match="not in lock-step"):
        case.speculative(case.inputs(3, False), **SAMPLED)


def test_random_drafts_and_max_time(cases, in_lock_step) -> None:
    case = cases("emu3")
    inputs = case.inputs(3, True)
    options = {**SAMPLED, "first_drafts": "random"}
    out = case.speculative(inputs, generator=generators(3), **options)
    assert torch.equal(
        out.sequences, in_lock_step(case.speculative, inputs, generator=generators(3), **options).sequences
    )
    with pytest.raises(TimeoutError, match="max_time"):
        case.speculative(inputs, max_time=1e-9, **SAMPLED)

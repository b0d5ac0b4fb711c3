"""The cache of raster decoders: each token once, and nothing that was not written."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tersor._compat import with_cache
from tersor.grids.raster.slots import Run, SlotLayer, Slots, write

pytestmark = pytest.mark.usefixtures("poison_empty")


def poisoned(monkeypatch, *, refilled: bool) -> None:
    """Numbers that nobody could overlook in every slot that is not written yet, or is about to be written again."""
    start, update = SlotLayer.lazy_initialization, SlotLayer.update

    def filled(self, *states):
        start(self, *states)
        for each in self.memory:
            each.fill_(torch.nan)

    def refill(self, keys, values, *args, **kwargs):
        if self.is_initialized:
            for each in self.memory:
                write(each, 2, self.slots.written, torch.full_like(keys, torch.nan))
        return update(self, keys, values, *args, **kwargs)

    monkeypatch.setattr(SlotLayer, "lazy_initialization", filled)
    if refilled:
        monkeypatch.setattr(SlotLayer, "update", refill)


@pytest.mark.parametrize("options", [{}, {"adaptive": True}], ids=["fixed", "adaptive"])
def test_unwritten_and_stale_slots_are_out_of_reach(case, monkeypatch, options) -> None:
    inputs = case.inputs(2, False)
    expected = case.zipar(inputs, window_size=1, output_scores=True, **options)
    poisoned(monkeypatch, refilled=True)
    out = case.zipar(inputs, window_size=1, output_scores=True, **options)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(torch.stack(out.scores), torch.stack(expected.scores))


@pytest.mark.parametrize("mode", ["seed", "law"])
def test_slots_of_drafts_that_were_not_kept_are_out_of_reach(case, monkeypatch, mode) -> None:
    # Not a slot from the last decided token on is read before this pass has written it.
    def run():
        options = {"do_sample": True, "temperature": 1.5, "generator": torch.Generator().manual_seed(1)}
        return case.speculative(case.inputs(2, False), window_size=6, mode=mode, output_scores=True, **options)

    expected = run()
    poisoned(monkeypatch, refilled=True)
    feed = Slots.feed

    def spoil(self, offsets, listed, dtype):
        for layer in self.layers:
            for each in layer.memory:
                each[:, :, self.valid.shape[1] + listed[0] :] = torch.nan
        return feed(self, offsets, listed, dtype)

    monkeypatch.setattr(Slots, "feed", spoil)
    monkeypatch.setattr(Slots, "layers", property(lambda self: MADE[id(self)]), raising=False)
    honest = SlotLayer.__init__

    def remember(self, slots):
        honest(self, slots)
        MADE.setdefault(id(slots), []).append(self)

    monkeypatch.setattr(SlotLayer, "__init__", remember)
    MADE.clear()
    out = run()
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(torch.stack(out.scores), torch.stack(expected.scores))


#: Layers of the slots that a test looks at.
MADE: dict[int, list[SlotLayer]] = {}


def test_slots_next_to_each_other_are_written_as_a_run() -> None:
    slots = Slots(DynamicCache(), torch.ones(1, 2, dtype=torch.bool), 6)
    for fed, written in (([0, 1, 2], Run(2, 3)), ([1, 2, 3], Run(3, 3)), ([5], Run(6, 1)), ([4, 5], None)):
        slots.feed(torch.tensor(fed), fed, torch.float32)
        assert slots.written == written if written else slots.written.tolist() == [7, 6]
    assert slots.held == 8


def test_the_poison_works(cases, monkeypatch) -> None:
    """One slot more than there is would be seen."""
    case, feed = cases("llama"), Slots.feed

    def one_more(self, offsets, listed, dtype):
        mask = feed(self, offsets, listed, dtype)
        self.held += 1
        return torch.nn.functional.pad(mask, (0, 1))

    poisoned(monkeypatch, refilled=False)
    monkeypatch.setattr(Slots, "feed", one_more)
    with pytest.raises(ValueError, match="not a number"):
        case.zipar(case.inputs(2, False), window_size=1)


@pytest.mark.parametrize("options", [{}, {"adaptive": True}], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("name", ["llama", "llama_eol"])
def test_the_cache_holds_each_token_once(cases, name, options) -> None:
    case, cache = cases(name), DynamicCache()
    inputs = case.inputs(3, False)
    case.zipar(inputs, window_size=1, **with_cache(cache), **options)
    rows, columns = case.grid
    last = 1 + case.end_of_row  # the last cell and the end of its row are never fed
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + rows * (columns + case.end_of_row) - last


@pytest.mark.parametrize("name", ["llama", "llama_eol", "emu3"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_callers_cache_is_left_as_token_by_token_leaves_it(cases, name, guidance) -> None:
    """What speculative decoding draws is what raster decoding draws, and so is what it leaves in the cache."""
    case, ours, theirs = cases(name), DynamicCache(), DynamicCache()
    inputs = case.inputs(2, case.pads)
    first = case.speculative(inputs, guidance=guidance, window_size=4, **with_cache(ours)).sequences
    assert torch.equal(first, case.raster(inputs, guidance, **with_cache(theirs))[:, : first.shape[1]])
    cells = ours.get_seq_length()
    seen = inputs["attention_mask"].bool()[:, None, :, None]
    for own, other in zip(ours.layers, theirs.layers, strict=True):
        assert type(own) is type(other)
        for found, wanted in ((own.keys, other.keys), (own.values, other.values)):
            prompt = seen.shape[2]
            torch.testing.assert_close(found[:, :, prompt:], wanted[:, :, prompt:cells], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found[:, :, :prompt] * seen, wanted[:, :, :prompt] * seen, atol=1e-4, rtol=1e-4)


def test_a_static_cache_is_filled_too(cases) -> None:
    case = cases("llama")
    inputs = case.inputs(2, True)
    dynamic, static = DynamicCache(), StaticCache(case.model.config, max_cache_len=40)
    for cache in (dynamic, static):
        case.zipar(inputs, window_size=2, **with_cache(cache))
    cells = dynamic.get_seq_length()
    assert cells == static.get_seq_length()
    assert torch.equal(static.layers[0].keys[:, :, :cells], dynamic.layers[0].keys)


def test_an_interrupted_image_leaves_the_callers_cache_empty(cases) -> None:
    case, cache = cases("llama"), DynamicCache()
    with pytest.raises(TimeoutError):
        case.zipar(case.inputs(1, False), window_size=2, max_time=0.0, **with_cache(cache))
    assert cache.get_seq_length() == 0
    case.zipar(case.inputs(1, False), window_size=2, **with_cache(cache))
    assert cache.get_seq_length() > 0


@pytest.mark.parametrize("name", ["llama", "llama_eol", "emu3", "imagegpt"])
@pytest.mark.parametrize("options", [{"guidance": 3.0}, {"adaptive": True}], ids=["guided", "adaptive"])
def test_a_static_cache_gives_the_same(cases, name, options) -> None:
    case = cases(name)
    inputs = case.inputs(2, case.pads)
    expected = case.zipar(inputs, window_size=2, **options)
    out = case.zipar(inputs, window_size=2, cache_implementation="static", **options)
    assert torch.equal(out.sequences, expected.sequences)


def test_rows_write_slots_of_their_own() -> None:
    memory, states = torch.zeros(3, 2, 5, 4), torch.randn(2, 2, 3, 4)
    slots = torch.tensor([[0, 1, 4], [2, 3, 3]])
    states[1, :, 2] = states[1, :, 1]
    write(memory, 2, slots, states)
    assert torch.equal(memory[0][:, [0, 1, 4]], states[0]) and torch.equal(memory[1][:, [2, 3]], states[1, :, :2])
    assert not memory[0, :, 2:4].any() and not memory[1][:, [0, 1, 4]].any() and not memory[2].any()

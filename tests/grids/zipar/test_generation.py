"""ZipAR on whole models: what must hold exactly, whatever the weights."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from transformers import DynamicCache, TemperatureLogitsWarper

from tersor.grids.geometry import RasterGrid
from tersor.grids.sampling import Sampler
from tersor.grids.schedule import raster_passes, zipar_passes
from tersor.grids.zipar.adapters import find_adapter
from tersor.grids.zipar.generation import zipar, zipar_generate
from tersor.grids.zipar.slots import SlotLayer, Slots, write

pytestmark = pytest.mark.usefixtures("poison_empty")


@pytest.fixture
def spy(monkeypatch):
    """Record the arguments and results of every forward of a case's adapter."""

    def watch(case):
        calls, adapter = [], find_adapter(case.model)
        original = adapter.logits

        def logits(self, embeddings, positions, mask, cache, keep):
            result = original(self, embeddings, positions, mask, cache, keep)
            calls.append((embeddings, positions.expand(embeddings.shape[:2]), mask, keep, result))
            return result

        monkeypatch.setattr(adapter, "logits", logits)
        return calls

    return watch


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_full_window_is_the_models_own_decoding(case, batch, padded, guidance) -> None:
    inputs = case.inputs(batch, padded and case.pads)
    expected = case.raster(inputs, guidance)
    out = case.zipar(inputs, guidance, window_size=case.grid[1])
    assert torch.equal(out.sequences, expected)
    assert out.forward_passes == case.grid[0] * case.grid[1]


def test_the_comparison_with_raster_notices_positions_that_are_off_by_one(case, monkeypatch) -> None:
    inputs = case.inputs(3, False)
    adapter = find_adapter(case.model)
    original = adapter.logits
    monkeypatch.setattr(
        adapter,
        "logits",
        lambda self, embeddings, positions, *rest: original(
            self, embeddings, positions - (positions > 2).long(), *rest
        ),
    )
    out = case.zipar(inputs, window_size=case.grid[1])
    assert not torch.equal(out.sequences, case.raster(inputs, 1.0))


@pytest.mark.parametrize("padded", [False, True])
def test_passes_and_statistics(case, padded) -> None:
    rows, columns = case.grid
    modes = ("eol",) if case.end_of_row else ("conservative", "eager")
    for mode in modes:
        for window in range(1, columns + 1):
            out = case.zipar(case.inputs(2, padded and case.pads), window_size=window, row_start=mode)
            assert out.forward_passes == zipar_passes(rows, columns, window, mode)
            assert out.tokens_per_pass == rows * columns / out.forward_passes
            first = columns if mode == "conservative" else window
            assert out.window_used == [0, first, *[window] * (rows - 2)]
            assert out.row_start_pass[-1] + columns - 1 == out.forward_passes


def teacher_error(case, calls) -> float:
    """Largest difference to one forward without a cache over everything that was fed.

    Token j is visible to query i iff j's position is not above i's, j was fed no later, and nothing was fed in its
    place by then.
    """
    lengths = [call[0].shape[1] for call in calls]
    fed = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])
    embeddings = torch.cat([call[0] for call in calls], dim=1)
    positions = torch.cat([call[1] for call in calls], dim=1)
    prefix = lengths[0]
    stale_from = torch.full_like(fed, len(calls))
    for j in range(prefix, len(fed)):
        later = [fed[i] for i in range(j + 1, len(fed)) if positions[0, i] == positions[0, j]]
        stale_from[j] = later[0] if later else stale_from[j]
    visible = positions[:, None, :] <= positions[:, :, None]
    visible &= (fed[None, :] <= fed[:, None]) & (stale_from[None, :] > fed[:, None])
    # The prefix as it was masked in the first call: padding and order within it.
    visible[:, :prefix, :prefix] = calls[0][2][:, 0, :, :prefix] == 0
    valid = visible[:, prefix - 1, :prefix]
    visible[:, prefix:, :prefix] = valid[:, None]
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None]
    model = copy.deepcopy(case.model)
    if case.name == "imagegpt":
        for block in model.transformer.h:  # more tokens at once than the model ever holds, proxies included
            block.attn.bias = torch.ones(1, 1, len(fed), len(fed), dtype=torch.bool).tril()
    adapter = find_adapter(model)(model)
    with torch.no_grad():
        full = adapter.logits(embeddings, positions, mask, DynamicCache(), list(range(len(fed))))
    worst, start = 0.0, 0
    for length, (*_, keep, logits) in zip(lengths, calls, strict=True):
        worst = max(worst, (full[:, [start + each for each in keep]] - logits).abs().max().item())
        start += length
    return worst


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    "options", [{"window_size": 2}, {"window_size": 1, "adaptive": True}], ids=["fixed", "adaptive"]
)
def test_one_forward_without_a_cache_gives_the_same_logits(case, spy, guidance, options) -> None:
    calls = spy(case)
    case.zipar(case.inputs(3, case.pads), guidance, **options)
    recorded = list(calls)
    assert teacher_error(case, recorded) < 2e-5


def test_eager_rows_pass_the_same_check(cases, spy) -> None:
    case = cases("llama")
    calls = spy(case)
    case.zipar(case.inputs(3, True), window_size=2, row_start="eager")
    assert teacher_error(case, list(calls)) < 2e-5


@pytest.mark.parametrize("name", ["llama", "emu3", "imagegpt", "llamagen_class"])
def test_the_check_notices_a_mask_that_shows_lower_rows(cases, spy, monkeypatch, name) -> None:
    case, honest = cases(name), Slots.feed
    calls = spy(case)
    monkeypatch.setattr(Slots, "feed", lambda *call: honest(*call) * 0)
    case.zipar(case.inputs(1, False), window_size=2)
    assert teacher_error(case, list(calls)) > 1e-3


@pytest.mark.parametrize("name", ["llama", "janus", "llamagen_class"])
def test_the_check_notices_stale_proxies(cases, spy, monkeypatch, name) -> None:
    case, honest = cases(name), Slots.feed
    calls = spy(case)

    def beside(self, offsets, listed, dtype):
        for each in set(listed) & set(self.slot_of):
            self.slot_of[-1 - len(self.slot_of)] = self.slot_of.pop(each)
        return honest(self, offsets, listed, dtype)

    monkeypatch.setattr(Slots, "feed", beside)
    monkeypatch.setattr("tersor.grids.zipar.decoding.max_fed_tokens", lambda grid: 2 * grid.length)
    case.zipar(case.inputs(1, False), window_size=2)
    assert teacher_error(case, list(calls)) > 1e-3


class Force:
    """A processor that leaves one token to one cell, found by the length of what precedes it."""

    def __init__(self, length: int, token: int) -> None:
        self.length, self.token = length, token

    def __call__(self, ids, scores):
        if ids.shape[1] != self.length:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.token] = 0
        return forced


def forced_scores(case, row: int, window: int, tokens: tuple[int, int]) -> list[torch.Tensor]:
    """Scores ``[batch, rows, columns, vocabulary]`` with one or the other token in the first cell of ``row``."""
    inputs = case.inputs(2, False)
    seen = 0 if find_adapter(case.model).own_vocabulary else inputs["input_ids"].shape[1]
    length = seen + RasterGrid(*case.grid, end_of_row=case.end_of_row).offset(row, 0)
    both = []
    for token in tokens:
        out = case.zipar(inputs, window_size=window, output_scores=True, logits_processor=[Force(length, token)])
        both.append(torch.stack(out.scores, dim=1).unflatten(1, case.grid))
    return both


def two_tokens(case) -> tuple[int, int]:
    allowed = find_adapter(case.model)(case.model).allowed_ids
    return (allowed[3], allowed[7]) if allowed else (3, 7)


def test_upper_rows_never_see_lower_ones(case) -> None:
    one, other = forced_scores(case, 1, 1, two_tokens(case))
    finite = torch.isfinite(one) & torch.isfinite(other)
    change = torch.where(finite, one - other, 0.0).abs().amax((0, 3))
    assert change[0].max() == 0, "not a bit of row 0 may depend on row 1"
    assert change[1, 1:].min() > 1e-6, "the cells after it do"


@pytest.mark.parametrize("name", ["llama_eol", "emu3"])
def test_that_check_notices_a_mask_that_shows_everything(cases, monkeypatch, name) -> None:
    honest = Slots.feed
    monkeypatch.setattr(Slots, "feed", lambda *call: honest(*call) * 0)
    case = cases(name)
    one, other = forced_scores(case, 1, 1, two_tokens(case))
    assert (one - other)[:, 0].nan_to_num().abs().max() > 1e-6


@pytest.mark.parametrize("name", ["llama_eol", "emu3"])
def test_batched_guidance_is_two_runs_combined(cases, monkeypatch, name) -> None:
    case = cases(name)
    inputs = case.inputs(2, True)
    negative = {"negative_prompt_ids": inputs["input_ids"][:, -3:]}
    together = case.zipar(inputs, 3.0, window_size=2, output_scores=True, **negative)
    adapter = find_adapter(case.model)
    original = adapter.logits
    caches = DynamicCache(), DynamicCache()

    def apart(self, embeddings, positions, mask, cache, keep):
        original(self, embeddings, positions, mask, cache, keep)
        for each in caches:
            each.layer_class_to_replicate = partial(SlotLayer, cache.layers[0].slots)
        masks = mask.expand(len(embeddings), -1, -1, -1).chunk(2)
        halves = zip(embeddings.chunk(2), positions.chunk(2), masks, caches, strict=True)
        conditional, unconditional = (original(self, *half, keep).log_softmax(-1) for half in halves)
        mixed = unconditional + 3.0 * (conditional - unconditional)
        # Equal halves: the decoder's own combination then leaves them as they are.
        return torch.cat([mixed, mixed])

    monkeypatch.setattr(adapter, "logits", apart)
    by_hand = case.zipar(inputs, 3.0, window_size=2, output_scores=True, **negative)
    assert torch.equal(together.sequences, by_hand.sequences)
    for one, other in zip(together.scores, by_hand.scores, strict=True):
        torch.testing.assert_close(one.log_softmax(-1), other.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_a_scale_of_one_is_no_guidance(case, spy) -> None:
    calls = spy(case)
    inputs = case.inputs(2, False)
    plain = case.zipar(inputs, 1.0, window_size=2)
    assert all(call[0].shape[0] == 2 for call in calls)
    guided = case.zipar(inputs, 3.0, window_size=2)
    assert calls[-1][0].shape[0] == 4
    assert not torch.equal(plain.sequences, guided.sequences) or case.name == "imagegpt"


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
    case.zipar(inputs, window_size=1, past_key_values=cache, **options)
    rows, columns = case.grid
    last = 1 + case.end_of_row  # the last cell and the end of its row are never fed
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + rows * (columns + case.end_of_row) - last


@pytest.mark.parametrize("name", ["llama", "llama_eol", "emu3", "imagegpt"])
@pytest.mark.parametrize("options", [{"guidance": 3.0}, {"adaptive": True}], ids=["guided", "adaptive"])
def test_a_static_cache_gives_the_same(cases, name, options) -> None:
    case = cases(name)
    inputs = case.inputs(2, case.pads)
    expected = case.zipar(inputs, window_size=2, **options)
    out = case.zipar(inputs, window_size=2, cache_implementation="static", **options)
    assert torch.equal(out.sequences, expected.sequences)


def test_sampling_at_the_full_window_draws_what_generate_draws(cases) -> None:
    case = cases("llama")
    inputs, rows = case.inputs(3, True), case.grid
    options = {"do_sample": True, "top_k": 12, "temperature": 1.3, "top_p": 0.9}
    torch.manual_seed(5)
    expected = case.model.generate(**inputs, max_new_tokens=rows[0] * rows[1], **options)
    torch.manual_seed(5)
    out = case.zipar(inputs, window_size=rows[1], **options)
    assert torch.equal(out.sequences, expected)


def test_a_generator_decides_the_draws_and_leaves_the_global_state_alone(case) -> None:
    inputs = case.inputs(2, False)
    state = torch.get_rng_state()
    same = [
        case.zipar(inputs, do_sample=True, window_size=2, adaptive=True, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(same[0].sequences, same[1].sequences)
    assert not torch.equal(same[0].sequences, same[2].sequences)


def test_processors_see_a_raster_prefix_of_the_right_length(cases) -> None:
    case = cases("llama_eol")
    inputs, seen = case.inputs(2, False), []
    tokens = inputs["input_ids"].shape[1]

    def watch(ids, scores):
        seen.append(ids.clone())
        return scores

    out = case.zipar(inputs, window_size=1, logits_processor=[watch])
    stride = case.grid[1] + 1
    final = out.sequences
    assert {len(ids[0]) - tokens for ids in seen} == {
        row * stride + c for row in range(case.grid[0]) for c in range(case.grid[1])
    }
    for ids in seen:
        assert torch.equal(ids[:, :tokens], inputs["input_ids"])
        image, same = ids[:, tokens:], final[:, tokens : ids.shape[1]]
        ends = torch.arange(image.shape[1]) % stride == case.grid[1]
        assert (image[:, ends] == 55).all(), "end-of-row tokens are in place"
        assert ((image == same) | (image == 0)).all(), "decided tokens, or the pad id"
    assert any((ids[:, tokens:] == 0).any() for ids in seen)


def test_repetition_penalty_equals_the_librarys_at_the_full_window(cases) -> None:
    case = cases("llama")
    inputs = case.inputs(2, False)
    expected = case.model.generate(**inputs, max_new_tokens=20, do_sample=False, repetition_penalty=2.0)
    out = case.zipar(inputs, window_size=5, repetition_penalty=2.0)
    assert torch.equal(out.sequences, expected)


def test_scores_come_in_raster_order(cases) -> None:
    case = cases("llama")
    inputs = case.inputs(2, False)
    options = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 20}
    expected = case.model.generate(**inputs, **options)
    out = case.zipar(inputs, window_size=5, output_scores=True)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores), atol=2e-5, rtol=1e-5)
    ahead = case.zipar(inputs, window_size=1, output_scores=True)
    drawn = torch.stack([scores.argmax(-1) for scores in ahead.scores], dim=1)
    assert torch.equal(drawn, ahead.sequences[:, inputs["input_ids"].shape[1] :])


def test_several_images_a_prompt(case) -> None:
    out = case.zipar(
        case.inputs(2, False), 3.0, window_size=2, do_sample=True, num_return_sequences=2, generator=torch.Generator()
    )
    assert out.sequences.shape[0] == 4


def test_several_images_a_prompt_keep_their_own_negative_prompt(cases) -> None:
    case = cases("llama")
    inputs = case.inputs(2, False)
    # Greedy for the library's sake, which copies prompts for sampling only.
    negative = {"negative_prompt_ids": torch.tensor([[3, 4], [17, 9]]), "do_sample": True, "top_k": 1}
    once = case.zipar(inputs, 3.0, window_size=2, **negative).sequences
    twice = case.zipar(inputs, 3.0, window_size=2, num_return_sequences=2, **negative).sequences
    assert torch.equal(twice, once.repeat_interleave(2, dim=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_finite_scores_with_padding(cases, dtype) -> None:
    case = cases("llama")
    half = copy.deepcopy(case.model).to(dtype)
    options = {"grid_size": case.grid, "window_size": 2, "return_dict_in_generate": True, "output_scores": True}
    out = zipar_generate(half, case.inputs(3, True), do_sample=False, adaptive=True, **options)
    assert torch.isfinite(torch.stack(out.scores)).all()


def test_eager_attention_gives_the_same(cases) -> None:
    case = cases("llama")
    eager = copy.deepcopy(case.model)
    eager.set_attn_implementation("eager")
    inputs = case.inputs(3, True)
    out = zipar_generate(eager, inputs, grid_size=case.grid, window_size=2, do_sample=False)
    assert torch.equal(out, case.zipar(inputs, window_size=2).sequences)


def test_emu3_finds_its_grid_and_goes_on_from_whole_rows(cases) -> None:
    case = cases("emu3")
    inputs = case.inputs(2, False)
    whole = case.zipar(inputs, window_size=4).sequences
    tokens = inputs["input_ids"].shape[1]
    # One row of the image is in the prompt already.
    begun = {"input_ids": whole[:, : tokens + 5], "attention_mask": torch.ones(2, tokens + 5, dtype=torch.long)}
    again = case.zipar(begun, window_size=4)
    assert torch.equal(again.sequences, whole)
    assert again.forward_passes == 2 * 4
    begun = {name: each[:, :-1] for name, each in begun.items()}
    with pytest.raises(ValueError, match="holds 4 tokens of the image; only whole rows of 5"):
        case.zipar(begun)


def test_emu3_takes_its_processors_constraint_as_it_is(cases) -> None:
    case = cases("emu3")
    inputs = case.inputs(2, True)
    rows, columns = case.grid
    mark = case.model.config.vocabulary_map["<|image token|>"]
    visual, seen = case.model.vocabulary_mapping.image_tokens, set()

    def allowed(_, ids):
        # It counts from the image's mark on; rows that run ahead must not confuse it.
        place = len(ids) - int((ids == mark).nonzero()[0]) - 1
        seen.add(place)
        assert place % (columns + 1) != columns, "end-of-row tokens are never drawn"
        return visual[: 5 + place % 3]

    out = case.zipar(inputs, window_size=2, prefix_allowed_tokens_fn=allowed)
    assert seen == {row * (columns + 1) + column for row in range(rows) for column in range(columns)}
    image = out.sequences[:, inputs["input_ids"].shape[1] : -3]
    for place in seen:
        assert set(image[:, place].tolist()) <= set(visual[: 5 + place % 3])


def test_the_models_own_guidance_scale_counts(cases) -> None:
    for name in ("janus", "llamagen_class", "emu3"):
        case = cases(name)
        inputs, config = case.inputs(2, False), case.model.generation_config
        config.guidance_scale = 3.0
        try:
            own = case.zipar(inputs, None, window_size=2)
        finally:
            config.guidance_scale = None
        assert torch.equal(own.sequences, case.zipar(inputs, 3.0, window_size=2).sequences)
    janus = cases("janus")
    unset = janus.zipar(janus.inputs(2, False), None, window_size=2)
    assert torch.equal(unset.sequences, janus.zipar(janus.inputs(2, False), 5.0, window_size=2).sequences)


def test_emu3_decodes_what_comes_out(cases) -> None:
    case = cases("emu3")
    inputs = case.inputs(1, False)
    out = case.zipar(inputs, window_size=2).sequences[:, inputs["input_ids"].shape[1] :]
    rows, columns = case.grid
    kept = out[:, :-3].view(1, rows, columns + 1)
    ids = case.model.vocabulary_mapping.convert_bpe2img(kept)
    assert ids.shape == (1, rows, columns)
    assert (kept[..., -1] == case.model.vocabulary_mapping.eol_token_id).all()


def test_emu3_at_its_real_grid_takes_713_passes(large_emu3) -> None:
    model, inputs = large_emu3
    out = zipar_generate(model, inputs, window_size=7, do_sample=False, return_dict_in_generate=True)
    assert out.forward_passes == 713
    assert raster_passes(RasterGrid(90, 90, end_of_row=True)) == 8190
    assert out.sequences.shape[1] == inputs["input_ids"].shape[1] + 90 * 91 + 3


def test_zipar_is_a_custom_generate(cases) -> None:
    case = cases("llama")
    inputs = case.inputs(2, False)
    out = case.model.generate(
        **inputs, max_new_tokens=20, do_sample=False, custom_generate=zipar, grid_size=case.grid, window_size=2
    )
    assert torch.equal(out, case.zipar(inputs, window_size=2).sequences)


def test_what_is_decoded_can_be_trained_on(case) -> None:
    # Decoding runs in inference mode, whose tensors autograd refuses.
    out = case.zipar(case.inputs(2, case.pads), window_size=2, adaptive=True, output_scores=True)
    assert not any(each.is_inference() for each in (out.sequences, *out.scores))


def test_infinity_can_be_taken_but_not_drawn() -> None:
    scores, cells = torch.zeros(2, 3, 4), ((0, 2), (1, 1), (2, 0))
    scores[1, 1, 3] = torch.inf
    greedy, sampling = (Sampler([], do_sample) for do_sample in (False, True))
    assert greedy.draw(greedy.process(scores, cells, lambda cell: scores))[1, 1] == 3
    with pytest.raises(ValueError, match="row 1, column 1"):
        sampling.process(scores, cells, lambda cell: scores)


def test_draws_are_those_of_multinomial() -> None:
    scores = 4 * torch.randn(3, 5, 50, generator=torch.Generator().manual_seed(1))
    scores[..., ::3] = -torch.inf
    one, other = (torch.Generator().manual_seed(2) for _ in range(2))
    expected = torch.multinomial(scores.softmax(-1).flatten(0, 1), 1, generator=one).view(3, 5)
    assert torch.equal(Sampler([], True, other).draw(scores), expected)
    assert torch.equal(one.get_state(), other.get_state())


def test_processors_that_read_only_scores_run_once_for_all_rows() -> None:
    calls = []

    class Counted(TemperatureLogitsWarper):
        def __call__(self, ids, scores):
            calls.append(tuple(scores.shape))
            return super().__call__(ids, scores)

    sampler = Sampler([lambda ids, scores: scores + ids.shape[1], Counted(2.0)], do_sample=False)
    cells = ((0, 2), (1, 1), (2, 0))
    out = sampler.process(torch.zeros(2, 3, 4), cells, lambda i: torch.zeros(2, 10 * cells[i][0] + cells[i][1]))
    assert out[0, :, 0].tolist() == [1, 5.5, 10]
    assert calls == [(6, 4)]

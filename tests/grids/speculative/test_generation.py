"""Speculative decoding on whole models: the image of raster decoding from the same seed, whatever the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import tersor
from tersor._compat import with_cache
from tersor.grids.raster.adapters import find_adapter
from tersor.grids.speculative.generation import apply_speculative, remove_speculative, speculative_generate
from tersor.grids.zipar.generation import apply_zipar

pytestmark = pytest.mark.usefixtures("poison_empty")
#: Flat enough that most drafts are wrong somewhere, and some are right.
SAMPLED = {"do_sample": True, "temperature": 1.5}


def seeded(function, *args, **options):
    torch.manual_seed(5)
    return function(*args, **options)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_image_is_the_one_that_generate_draws_from_the_same_seed(case, batch, padded, guidance) -> None:
    inputs = case.inputs(batch, padded and case.pads)
    expected = seeded(case.raster, inputs, guidance, **SAMPLED)
    columns, cells = case.grid[1], case.grid[0] * case.grid[1]
    for window in (1, 2, columns - 1, columns, columns + 1, cells):
        out = seeded(case.speculative, inputs, guidance, window_size=window, **SAMPLED)
        assert torch.equal(out.sequences, expected), window
        assert out.forward_passes == len(out.cells_per_pass) <= cells
        assert sum(out.cells_per_pass) == cells


@pytest.mark.parametrize("first_drafts", ["left", "random", "law above", "law left"])
def test_first_drafts_change_the_passes_and_not_the_image(case, first_drafts) -> None:
    inputs = case.inputs(2, case.pads)
    expected = seeded(case.raster, inputs, 1.0, **SAMPLED)
    for window in (3, 9):
        out = seeded(case.speculative, inputs, window_size=window, first_drafts=first_drafts, **SAMPLED)
        assert torch.equal(out.sequences, expected)


@pytest.mark.parametrize("mode", ["seed", "law", "grouped"])
@pytest.mark.parametrize("first_drafts", ["above", "random", "law left"])
def test_greedy_decoding_is_rasters_in_every_mode(case, mode, first_drafts) -> None:
    inputs = case.inputs(3, case.pads)
    state = torch.get_rng_state()
    out = case.speculative(inputs, 3.0, mode=mode, first_drafts=first_drafts)
    assert torch.equal(out.sequences, case.raster(inputs, 3.0))
    assert out.forward_passes <= case.grid[0] * case.grid[1]
    assert torch.equal(torch.get_rng_state(), state)


def not_twice(ids, scores):
    """A processor of one's own: the token before is less likely."""
    return scores - torch.nn.functional.one_hot(ids[:, -1], 60)


PROCESSORS = {
    "cut": {"top_k": 12, "top_p": 0.9},
    "least probability": {"min_p": 0.05},
    "typical": {"typical_p": 0.8},
    "epsilon": {"epsilon_cutoff": 0.02},
    "eta": {"eta_cutoff": 0.02},
    "repetition": {"repetition_penalty": 2.0},
    "no pairs twice": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[7], [11, 12]]},
    "bias": {"sequence_bias": [[[9], 2.0], [[8, 9], -3.0]]},
    "suppressed": {"suppress_tokens": [3, 4, 5]},
    "of one's own": {
        "logits_processor": [lambda ids, scores: scores - 0.3 * torch.nn.functional.one_hot(ids[:, -1], 60)]
    },
}


@pytest.mark.parametrize("options", PROCESSORS.values(), ids=PROCESSORS)
def test_processors_see_the_raster_prefix(cases, options) -> None:
    case = cases("llama")
    inputs = case.inputs(3, True)
    expected = seeded(case.raster, inputs, 1.0, **{"top_k": 0, **SAMPLED, **options})
    out = seeded(case.speculative, inputs, window_size=7, **{"top_k": 0, **SAMPLED, **options})
    assert torch.equal(out.sequences, expected)


@pytest.mark.parametrize("mode", ["seed", "law"])
def test_a_processor_may_leave_nothing_after_a_wrong_draft(cases, mode) -> None:
    case = cases("llama")
    inputs = case.inputs(1, False)
    expected = case.raster(inputs, 1.0)

    def only_this_image(ids, scores):
        right = torch.equal(ids, expected[:, : ids.shape[1]])
        left = torch.full_like(scores, -torch.inf)
        if right:
            left[:, expected[0, ids.shape[1]]] = 0
        return left

    out = case.speculative(inputs, mode=mode, do_sample=True, window_size=6, logits_processor=[only_this_image])
    assert torch.equal(out.sequences, expected)

    def nothing_at_the_tenth(ids, scores):
        return torch.full_like(scores, -torch.inf) if ids.shape[1] == 6 + 10 else scores

    with pytest.raises(ValueError, match="no token for row 2, column 0"):
        case.speculative(inputs, mode=mode, do_sample=True, logits_processor=[nothing_at_the_tenth])


def test_fifty_images_and_the_generators_state_are_rasters(cases) -> None:
    case = cases("llamagen_class")
    for seed in range(50):
        one, other = (torch.Generator().manual_seed(seed) for _ in range(2))
        inputs = {"class_labels": torch.tensor([seed % 5])}
        expected = case.raster(inputs, 1.0, generator=one, **SAMPLED)
        out = case.speculative(inputs, generator=other, **SAMPLED)
        assert torch.equal(out.sequences, expected)
        assert torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize("name", ["llama_eol", "emu3", "llamagen_text"])
def test_an_image_with_a_generator_of_its_own_does_not_depend_on_its_batch(cases, name) -> None:
    case = cases(name)
    inputs = case.inputs(3, True)
    out = case.speculative(inputs, generator=[torch.Generator().manual_seed(seed) for seed in range(3)], **SAMPLED)
    for seed in range(3):
        own = {key: value[seed : seed + 1] for key, value in inputs.items()}
        alone = case.speculative(own, generator=torch.Generator().manual_seed(seed), **SAMPLED)
        assert torch.equal(alone.sequences[0], out.sequences[seed])
        assert alone.forward_passes <= out.forward_passes, "a batch waits for its slowest image"


def test_windows_of_zipar_take_a_generator_an_image_too(cases) -> None:
    case = cases("llamagen_class")
    inputs = case.inputs(3, False)

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(3)]

    out = case.zipar(inputs, window_size=2, generator=generators(), **SAMPLED)
    alone = {"class_labels": inputs["class_labels"][1:2]}
    expected = case.zipar(alone, window_size=2, generator=generators()[1], **SAMPLED)
    assert torch.equal(out.sequences[1:2], expected.sequences)
    with pytest.raises(ValueError, match="give one"):
        case.zipar(inputs, window_size=2, adaptive=True, generator=generators(), **SAMPLED)
    with pytest.raises(ValueError, match="give one"):
        case.speculative(inputs, mode="law", generator=generators(), **SAMPLED)
    with pytest.raises(ValueError, match="3 generators for 2 images"):
        case.speculative(case.inputs(2, False), generator=generators(), **SAMPLED)


@pytest.mark.parametrize("mode", ["law", "grouped"])
@pytest.mark.parametrize("first_drafts", ["above", "left", "random", "law above", "law left"])
def test_other_modes_decode_every_family(case, mode, first_drafts) -> None:
    inputs = case.inputs(2, case.pads)
    options = {"mode": mode, "first_drafts": first_drafts, "output_scores": True, **SAMPLED}
    out = case.speculative(inputs, 3.0, window_size=6, generator=torch.Generator(), **options)
    assert out.forward_passes <= case.grid[0] * case.grid[1]
    allowed = find_adapter(case.model)(case.model).allowed_ids
    stacked = torch.stack(out.scores, dim=1)
    assert stacked.isfinite().any(-1).all()
    if allowed is not None:
        assert set(stacked.argmax(-1).unique().tolist()) <= set(allowed)


def test_scores_are_those_of_the_pass_that_decides(cases) -> None:
    case = cases("llama")
    inputs = case.inputs(2, False)
    options = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 20, **SAMPLED}
    expected = seeded(case.model.generate, **inputs, **options)
    out = seeded(case.speculative, inputs, output_scores=True, **SAMPLED)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores), atol=2e-5, rtol=1e-5)


def test_statistics_count_what_was_run(case, monkeypatch) -> None:
    adapter, fed = find_adapter(case.model), []
    original = adapter.logits

    def logits(self, embeddings, *rest):
        fed.append(embeddings.shape[1])
        return original(self, embeddings, *rest)

    monkeypatch.setattr(adapter, "logits", logits)
    out = case.speculative(case.inputs(1, False), window_size=6)
    assert out.forward_passes == len(fed)
    assert out.fed_tokens == sum(fed[1:])
    assert out.tokens_per_pass == case.grid[0] * case.grid[1] / len(fed)
    assert out.cells_per_pass[0] == 1 and out.row_start_pass[0] == 1
    ends = torch.tensor(out.cells_per_pass).cumsum(0)
    for row, start in enumerate(out.row_start_pass):
        assert ends[start - 1] > row * case.grid[1] >= ends[start - 1] - out.cells_per_pass[start - 1]
    # Every pass decides one cell by drawing it anew, unless the whole window was right.
    drawn = round(sum((1 - each) * case.grid[1] for each in out.acceptance))
    assert drawn <= out.forward_passes


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_static_cache_gives_the_same(cases, guidance) -> None:
    for name in ("llama", "llama_eol", "emu3", "imagegpt"):
        case = cases(name)
        inputs = case.inputs(2, case.pads)
        expected = seeded(case.speculative, inputs, guidance, window_size=6, **SAMPLED)
        out = seeded(case.speculative, inputs, guidance, window_size=6, cache_implementation="static", **SAMPLED)
        assert torch.equal(out.sequences, expected.sequences)
    case = cases("llama")
    short = with_cache(StaticCache(case.model.config, max_cache_len=24))
    with pytest.raises(ValueError, match="has 24 slots; prompt and image need 25"):
        case.speculative(case.inputs(1, False), **short)


def test_the_cache_holds_each_token_once(cases) -> None:
    for name in ("llama", "llama_eol"):
        case, cache = cases(name), DynamicCache()
        inputs = case.inputs(3, False)
        case.speculative(inputs, window_size=6, **with_cache(cache))
        cells = case.grid[0] * (case.grid[1] + case.end_of_row)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] + cells - 1 - case.end_of_row


def test_it_is_a_custom_generate(cases) -> None:
    case = cases("llama_eol")
    inputs = case.inputs(2, False)
    options = {"custom_generate": tersor.speculative, "grid_size": case.grid, "eol_token_id": 55, "window_size": 4}
    out = seeded(case.model.generate, **inputs, max_new_tokens=24, **options, **SAMPLED)
    assert torch.equal(out, seeded(case.raster, inputs, 1.0, **SAMPLED))


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_text_is_a_grid_of_one_row(cases, do_sample) -> None:
    model, inputs = cases("llama").model, cases("llama").inputs(2, True)
    expected = seeded(model.generate, **inputs, max_new_tokens=30, do_sample=do_sample, temperature=1.5)
    options = {"grid_size": (1, 30), "first_drafts": "left", "do_sample": do_sample, "temperature": 1.5}
    assert torch.equal(seeded(speculative_generate, model, inputs, **options), expected)


def test_a_prompt_may_hold_rows_of_the_image(cases) -> None:
    case = cases("emu3")
    inputs = case.inputs(2, False)
    whole = case.speculative(inputs, window_size=5).sequences
    done = inputs["input_ids"].shape[1] + case.grid[1] + 1
    begun = {"input_ids": whole[:, :done], "attention_mask": torch.ones(2, done, dtype=torch.long)}
    assert torch.equal(case.speculative(begun, window_size=5).sequences, whole)


def test_half_precision_gives_finite_scores_with_padding(cases) -> None:
    case = cases("llama")
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(case.model).to(dtype)
        options = {"grid_size": case.grid, "return_dict_in_generate": True, "output_scores": True}
        out = speculative_generate(half, case.inputs(3, True), **options, **SAMPLED)
        assert torch.isfinite(torch.stack(out.scores).amax(-1)).all()


def test_what_is_decoded_can_be_trained_on(case) -> None:
    out = case.speculative(case.inputs(2, case.pads), mode="law", output_scores=True, **SAMPLED)
    assert not any(each.is_inference() for each in (out.sequences, *out.scores))


def test_apply_and_remove_restore_generate(case) -> None:
    model, own = case.model, case.model.generate
    inputs = case.inputs(1, False)
    mode = {"generation_mode": "image"} if case.name == "janus" else {}
    settings = {"grid_size": case.options.get("grid_size", case.grid), "eol_token_id": case.options.get("eol_token_id")}
    options = {"do_sample": False, "guidance_scale": 1.0, "return_dict_in_generate": True, **mode}
    expected = case.raster(inputs, 1.0)
    apply_zipar(model, window_size=1, **settings)
    assert apply_speculative(model, window_size=4, **settings) is model, "takes ZipAR's place"
    out = model.generate(**inputs, **options)
    assert torch.equal(out.sequences, expected) and out.cells_per_pass
    assert remove_speculative(model) is model
    assert model.generate == own and "generate" not in model.__dict__
    with pytest.raises(TypeError, match="apply_speculative has no settings \\['adaptive'\\]"):
        apply_speculative(model, adaptive=True)


REFUSED = {
    "window 0": ({"window_size": 0}, "at least 1, or 'auto'"),
    "window by a name of ZipAR's": ({"window_size": "fast"}, "or 'auto'"),
    "mode": ({"mode": "exact"}, "one of \\('seed', 'law', 'grouped'\\)"),
    "first drafts": ({"first_drafts": "below"}, "'law left'"),
    "no grid": ({"grid_size": None}, "give grid_size"),
    "too few tokens": ({"max_new_tokens": 7}, "7 new tokens is smaller than the image's 20"),
    "beams": ({"num_beams": 2}, "beam_search"),
    "streamer": ({"streamer": object()}, "streamer does not go with speculative decoding"),
    "stop strings": ({"stopping_criteria": [lambda ids, scores: False]}, "do not apply"),
    "too many positions": ({"grid_size": (60, 60)}, "positions, the model has 256"),
    "offloaded cache": (with_cache(DynamicCache(offloading=True)), "does not go with speculative decoding"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_met_is_refused_before_the_first_forward(cases, monkeypatch, options, message) -> None:
    case = cases("llama")

    def forward(*_, **__):
        raise AssertionError("the model was called before the request was checked")

    monkeypatch.setattr(find_adapter(case.model), "logits", forward)
    with pytest.raises(ValueError, match=message):
        case.speculative(case.inputs(3, False), **options)


def test_max_time_stops_at_a_pass(cases) -> None:
    with pytest.raises(TimeoutError, match="max_time"):
        cases("llama").speculative(cases("llama").inputs(1, False), max_time=1e-9)


@pytest.mark.parametrize("grid", [(1, 6), (6, 1), (1, 1), (2, 6)])
@pytest.mark.parametrize("name", ["llama", "llama_eol"])
def test_the_smallest_grids(cases, grid, name) -> None:
    case = cases(name)
    out = case.speculative(case.inputs(2, True), grid_size=grid, **SAMPLED)
    assert out.sequences.shape == (2, 6 + grid[0] * (grid[1] + case.end_of_row))

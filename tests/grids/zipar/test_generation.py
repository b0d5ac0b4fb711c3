"""ZipAR on whole models: what must hold exactly, whatever the weights."""

from __future__ import annotations

import copy

import pytest
import torch

from tersor.grids.geometry import RasterGrid
from tersor.grids.schedule import raster_passes, zipar_passes
from tersor.grids.zipar.generation import apply_zipar, remove_zipar, zipar, zipar_generate

pytestmark = pytest.mark.usefixtures("poison_empty")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_full_window_is_the_models_own_decoding(case, batch, padded, guidance) -> None:
    inputs = case.inputs(batch, padded and case.pads)
    expected = case.raster(inputs, guidance)
    out = case.zipar(inputs, guidance, window_size=case.grid[1])
    assert torch.equal(out.sequences, expected)
    assert out.forward_passes == case.grid[0] * case.grid[1]


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


def test_apply_and_remove_restore_generate(case) -> None:
    model = case.model
    own = model.generate
    inputs = case.inputs(1, False)
    mode = {"generation_mode": "image"} if case.name == "janus" else {}
    grid = case.options.get("grid_size", case.grid)
    options = {"do_sample": False, "guidance_scale": 1.0, "return_dict_in_generate": True}
    for window in (1, 2):  # applying again replaces the settings
        assert (
            apply_zipar(model, grid_size=grid, window_size=window, eol_token_id=case.options.get("eol_token_id"))
            is model
        )
        out = model.generate(**inputs, **options, **mode)
        assert out.window_used[-1] == window
    assert remove_zipar(model) is model
    assert model.generate == own
    assert "generate" not in model.__dict__
    assert remove_zipar(model).generate == own


def test_apply_leaves_text_alone_and_keeps_an_earlier_patch(cases) -> None:
    model = cases("emu3").model
    expected = model.generate(torch.tensor([[4, 5, 6]]), max_new_tokens=5, do_sample=False)
    apply_zipar(model, window_size=2)
    assert torch.equal(model.generate(torch.tensor([[4, 5, 6]]), max_new_tokens=5, do_sample=False), expected)
    prompt = cases("emu3").inputs(1, False)
    for given in (prompt, {**prompt, "image_sizes": torch.tensor([[3, 4]])}):
        out = model.generate(**given, do_sample=False, return_dict_in_generate=True)
        assert out.sequences.shape[1] == 9 + 18
        assert out.forward_passes == 2 * 2 + 4
    remove_zipar(model)

    def patch(*args, **kwargs):
        return "patched"

    model.generate = patch
    try:
        apply_zipar(model)
        remove_zipar(model)
        assert model.generate is patch
    finally:
        del model.generate


def test_a_failed_apply_leaves_the_model_as_it_was(cases) -> None:
    model = cases("llama").model
    with pytest.raises(ValueError, match="window_size"):
        apply_zipar(model, window_size=0)
    assert "generate" not in model.__dict__


def test_janus_text_passes_through(cases) -> None:
    case = cases("janus")
    prompt = case.inputs(1, False)
    expected = case.model.generate(**prompt, max_new_tokens=4, do_sample=False)
    apply_zipar(case.model, window_size=2)
    try:
        assert torch.equal(case.model.generate(**prompt, max_new_tokens=4, do_sample=False), expected)
        with pytest.raises(ValueError, match="streamer does not go"):
            case.model.generate(**prompt, generation_mode="image", streamer=object())
    finally:
        remove_zipar(case.model)

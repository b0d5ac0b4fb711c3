"""Patching ``generate`` on an instance, and taking the patch back."""

from __future__ import annotations

import pytest
import torch

from tersor.grids.zipar.generation import apply_zipar, remove_zipar


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

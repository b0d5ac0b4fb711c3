"""What cannot be met is refused before the first forward, with what can."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

import tersor
from tersor._compat import with_cache
from tersor._errors import TersorError
from tersor.grids.raster.adapters import find_adapter
from tersor.grids.zipar.generation import zipar_generate


@pytest.fixture
def no_forward(cases, monkeypatch):
    """Every forward is an error."""

    def forbid(name):
        case = cases(name)

        def forward(*_, **__):
            raise AssertionError("the model was called before the request was checked")

        monkeypatch.setattr(find_adapter(case.model), "logits", forward)
        return case

    return forbid


def llama_config(**changes):
    return LlamaConfig(
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **changes}
    )


REFUSED = {
    "window 0": ({"window_size": 0}, "whole number from 1"),
    "window of another type": ({"window_size": 1.5}, "whole number from 1"),
    "window of True": ({"window_size": True}, "whole number from 1"),
    "window by an unknown name": ({"window_size": "huge"}, "quality"),
    "row start": ({"row_start": "soon"}, "must be one of"),
    "row start of another grid": ({"row_start": "eol"}, "no end-of-row tokens"),
    "adaptive": ({"adaptive": "yes"}, "True or False"),
    "grid of 0 rows": ({"grid_size": (0, 5)}, "at least 1 token"),
    "grid of three axes": ({"grid_size": (2, 3, 4)}, r"\(rows, columns\)"),
    "no grid": ({"grid_size": None}, "give grid_size"),
    "too few tokens": ({"max_new_tokens": 7}, "7 new tokens is smaller than the image's 20"),
    "too short in all": ({"max_length": 12}, "6 new tokens is smaller than the image's 20"),
    "beams": ({"num_beams": 2}, "beam_search"),
    "sampled beams": ({"num_beams": 2, "do_sample": True}, "beam_sample"),
    "groups of beams": ({"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group_beam_search"),
    "constrained beams": ({"num_beams": 2, "force_words_ids": [[3]]}, "constrained_beam_search"),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
    "contrasted layers": ({"dola_layers": "high"}, "dola_generation"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "assisted_generation"),
    "assistant": ({"assistant_model": object()}, "assistant_model does not go"),
    "streamer": ({"streamer": object()}, "streamer does not go"),
    "attentions": ({"output_attentions": True}, "output_attentions is not available"),
    "hidden states": ({"output_hidden_states": True}, "output_hidden_states is not available"),
    "raw logits": ({"output_logits": True}, "output_logits is not available"),
    "stop strings": ({"stopping_criteria": [lambda ids, scores: False]}, "do not apply"),
    "guidance": ({"guidance_scale": -1.0}, "must not be negative"),
    "too many positions": ({"grid_size": (60, 60)}, "positions, the model has 256"),
    "short static cache": (
        with_cache(StaticCache(llama_config(), max_cache_len=24)),
        "has 24 slots; prompt and image need 25",
    ),
    "quantized cache": (with_cache(type("Quantized", (DynamicCache,), {})()), "Quantized .* does not go"),
    "offloaded cache": (with_cache(DynamicCache(offloading=True)), "offloaded"),
    "negative prompts": (
        {"guidance_scale": 2.0, "negative_prompt_ids": torch.ones(2, 3, dtype=torch.long)},
        "2 rows for 3 images",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_requests(no_forward, options, message) -> None:
    case = no_forward("llama")
    with pytest.raises(ValueError, match=message):
        case.zipar(case.inputs(3, False), **{"window_size": 2, **options})


@pytest.mark.parametrize(("name", "needed"), [("llama", 20), ("llama_eol", 4 * 6 - 1)])
def test_the_length_that_an_image_needs(cases, name, needed) -> None:
    case = cases(name)
    inputs = case.inputs(1, False)
    assert case.zipar(inputs, window_size=2, max_new_tokens=needed).forward_passes
    with pytest.raises(ValueError, match=f"{needed - 1} new tokens is smaller"):
        case.zipar(inputs, window_size=2, max_new_tokens=needed - 1)


def test_the_longer_of_two_prompts_counts(no_forward) -> None:
    case = no_forward("llama")
    negative = {"guidance_scale": 2.0, "negative_prompt_ids": torch.ones(1, 240, dtype=torch.long)}
    with pytest.raises(ValueError, match="need 259 positions, the model has 256"):
        case.zipar(case.inputs(1, False), **negative)


def test_prompts(no_forward) -> None:
    case = no_forward("llama")
    good = case.inputs(2, False)
    right = torch.ones(2, 6, dtype=torch.long)
    right[0, -2:] = 0
    with pytest.raises(ValueError, match="padding_side='left'"):
        case.zipar({**good, "attention_mask": right})
    with pytest.raises(ValueError, match="end-of-row token"):
        zipar_generate(no_forward("janus").model, good, eol_token_id=3)
    with pytest.raises(ValueError, match="does not take \\['pixel_values'\\] for an image"):
        zipar_generate(no_forward("janus").model, {**good, "pixel_values": torch.zeros(1)})
    with pytest.raises(ValueError, match="fixed length"):
        zipar_generate(no_forward("janus").model, good, max_new_tokens=5)
    with pytest.raises(ValueError, match="padded on the right"):
        zipar_generate(no_forward("janus").model, {**good, "attention_mask": right})


def test_grids_that_differ(no_forward) -> None:
    case = no_forward("emu3")
    inputs = case.inputs(2, False)
    with pytest.raises(ValueError, match=r"grid_size=\(4, 3\) does not match the \(3, 4\)"):
        case.zipar(inputs, grid_size=(4, 3))
    with pytest.raises(ValueError, match="image_sizes is"):
        case.zipar({**inputs, "image_sizes": torch.tensor([[4, 4], [4, 4]])})
    with pytest.raises(ValueError, match="group them by grid"):
        case.zipar({**inputs, "image_sizes": torch.tensor([[3, 4], [4, 4]])})
    mixed = inputs["input_ids"].clone()
    mixed[0, 5] = mixed[0, 5] + 1
    with pytest.raises(ValueError, match="group them by grid"):
        case.zipar({**inputs, "input_ids": mixed})
    with pytest.raises(ValueError, match="does not match"):
        zipar_generate(no_forward("janus").model, case.inputs(1, False), grid_size=(2, 8))


@pytest.mark.parametrize("size", [4, "4x4", (4,), (4, 4, 4), (0, 4), (2.5, 4), {4: 4}])
def test_sizes_that_are_none(no_forward, size) -> None:
    with pytest.raises(TersorError, match="grid"):
        no_forward("llama").zipar(no_forward("llama").inputs(1, False), grid_size=size)


@pytest.mark.parametrize("token", [10**6, -1, 1.5, True])
def test_an_end_of_row_that_is_no_token_is_refused(no_forward, token) -> None:
    case = no_forward("llama")
    with pytest.raises(TersorError, match=r"eol_token_id=.* must be a token of the model"):
        case.zipar(case.inputs(1, False), eol_token_id=token)


def test_janus_needs_its_own_entry(cases) -> None:
    model = cases("janus").model
    with pytest.raises(ValueError, match=r"call tersor.zipar_generate"):
        tersor.zipar(model, torch.ones(1, 3, dtype=torch.long))


def test_a_window_above_the_columns_is_raster_with_a_warning(cases) -> None:
    case = cases("llama")
    with pytest.warns(UserWarning, match="more than the grid's 5 columns"):
        out = case.zipar(case.inputs(1, False), window_size=9)
    assert out.forward_passes == 20


@pytest.mark.parametrize("grid", [(1, 6), (6, 1), (1, 1), (2, 6)])
@pytest.mark.parametrize("name", ["llama", "llama_eol"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_smallest_grids(cases, grid, name, adaptive) -> None:
    case = cases(name)
    inputs = case.inputs(2, True)
    out = case.zipar(inputs, grid_size=grid, window_size=1, adaptive=adaptive)
    assert out.sequences.shape == (2, 6 + grid[0] * (grid[1] + case.end_of_row))
    if 1 in grid:
        assert out.forward_passes == grid[0] * grid[1]


def test_a_static_cache_of_the_named_length_is_enough(cases) -> None:
    case = cases("llama")
    inputs = case.inputs(1, False)
    # 6 of the prompt, 20 cells less the last: the number in the error above.
    cache = StaticCache(case.model.config, max_cache_len=25)
    out = case.zipar(inputs, window_size=2, **with_cache(cache))
    assert torch.equal(out.sequences, case.zipar(inputs, window_size=2).sequences)


def test_a_cache_serves_image_after_image(cases) -> None:
    case = cases("llama")
    cache = DynamicCache(config=case.model.config)
    inputs = case.inputs(1, False)
    first = case.zipar(inputs, window_size=2, **with_cache(cache))
    cache.reset()
    assert torch.equal(case.zipar(inputs, window_size=2, **with_cache(cache)).sequences, first.sequences)


def test_a_cache_with_tokens_is_refused(cases) -> None:
    case = cases("llama")
    cache = DynamicCache(config=case.model.config)
    inputs = case.inputs(1, False)
    with torch.no_grad():
        case.model(inputs["input_ids"], **with_cache(cache))
    with pytest.raises(ValueError, match="already holds tokens"):
        tersor.zipar(
            case.model,
            inputs["input_ids"],
            generation_config=case.model.generation_config,
            grid_size=(4, 5),
            **with_cache(cache),
        )


def test_sliding_windows_are_refused() -> None:
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=8,
        )
    )
    with pytest.raises(ValueError, match="sliding"):
        zipar_generate(model, torch.ones(1, 3, dtype=torch.long), grid_size=(3, 3), do_sample=False)


def test_attention_without_4d_masks_is_refused(no_forward, monkeypatch) -> None:
    case = no_forward("llama")
    monkeypatch.setattr(case.model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        tersor.zipar(
            case.model,
            torch.ones(1, 3, dtype=torch.long),
            generation_config=case.model.generation_config,
            grid_size=(3, 3),
        )


def test_a_cell_without_any_token_is_named(cases) -> None:
    case = cases("llama")
    inputs = case.inputs(2, False)
    length = inputs["input_ids"].shape[1] + 2 * 5 + 3

    def forbid(ids, scores):
        return torch.full_like(scores, -torch.inf) if ids.shape[1] == length else scores

    with pytest.raises(ValueError, match="row 2, column 3"):
        case.zipar(inputs, window_size=2, logits_processor=[forbid])


def test_max_time_stops_at_a_pass(cases) -> None:
    case = cases("llama")
    with pytest.raises(TimeoutError, match="max_time"):
        case.zipar(case.inputs(1, False), window_size=2, max_time=1e-9)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1, 60]]), "ids from 1 to 60; the model's go from 0 to 59"),
        (torch.tensor([[1, -1]]), "ids from -1 to 1"),
        (torch.tensor([[1.0, 2.0]]), "torch.float32.*whole numbers"),
        (torch.zeros(0, 3, dtype=torch.long), "at least 1"),
        (torch.tensor([1, 2]), r"whole numbers \[batch, tokens\]"),
        ([[1, 2]], "whole numbers"),
    ],
)
@pytest.mark.parametrize("decode", ["zipar", "speculative"])
def test_a_prompt_that_is_none_of_the_models_is_refused(cases, decode, ids, message) -> None:
    case = cases("llama")
    with pytest.raises(ValueError, match=message):
        getattr(case, decode)({"input_ids": ids})


def test_a_mask_of_another_shape_is_refused(cases) -> None:
    with pytest.raises(ValueError, match="give both alike"):
        cases("janus").zipar({"input_ids": torch.tensor([[1, 5]]), "attention_mask": torch.ones(1, 3)})

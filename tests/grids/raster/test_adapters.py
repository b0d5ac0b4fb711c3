"""What each model class needs, and which classes are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    ChameleonForConditionalGeneration,
    FalconConfig,
    FalconForCausalLM,
    GlmImageForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tersor.grids.raster import adapters
from tersor.grids.raster.adapters import RasterAdapter, find_adapter, register_adapter
from tersor.grids.zipar.generation import zipar_generate

pytestmark = pytest.mark.usefixtures("poison_empty")


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


def test_other_models_are_refused_with_the_reason() -> None:
    with pytest.raises(TypeError, match="register_adapter"):
        find_adapter(T5ForConditionalGeneration(T5Config(num_layers=1, d_model=8, d_kv=4, d_ff=8, vocab_size=9)))
    with pytest.raises(TypeError, match="register_adapter"):
        find_adapter(object())
    for refused, reason in (
        (GlmImageForConditionalGeneration, "three axes"),
        (ChameleonForConditionalGeneration, "minus infinity"),
    ):
        with pytest.raises(TypeError, match=reason):
            find_adapter(refused.__new__(refused))
    for counts, config in (
        (BloomForCausalLM, BloomConfig(hidden_size=8, n_layer=1, n_head=1)),
        (FalconForCausalLM, FalconConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, alibi=True)),
        (MambaForCausalLM, MambaConfig(hidden_size=8, num_hidden_layers=1)),
    ):
        with torch.device("meta"), pytest.raises(TypeError, match=f"{counts.__name__} is not supported"):
            find_adapter(counts(config))
    remote = type("NewForCausalLM", (), {"__module__": "transformers_modules.new"})()
    with pytest.raises(TypeError, match="remote code"):
        find_adapter(remote)


def test_a_registered_adapter_is_used_for_its_class_and_derived_ones(monkeypatch) -> None:
    known = {name: each for name, each in adapters._ADAPTERS.items() if name != "GPT2LMHeadModel"}
    monkeypatch.setattr(adapters, "_ADAPTERS", known)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=40)).eval()
    with pytest.raises(TypeError, match="GPT2LMHeadModel is not supported"):
        zipar_generate(model, torch.ones(1, 2, dtype=torch.long), grid_size=(3, 4))
    register_adapter(GPT2LMHeadModel, RasterAdapter)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.tensor([[3, 4]])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(zipar_generate(model, ids, grid_size=(3, 4), window_size=4, do_sample=False), expected)
    derived = type("Derived", (GPT2LMHeadModel,), {})
    assert find_adapter(derived.__new__(derived)) is RasterAdapter
    with pytest.raises(TypeError, match="subclass of RasterAdapter"):
        register_adapter(GPT2LMHeadModel, object)

"""Our LlamaGen: its parts against the formulas, its own decoding, and checkpoints."""

from __future__ import annotations

import pytest
import torch
from original_weights import broken, original_weights
from raster_models import TEXT_CONDITION, llamagen_config
from transformers import AutoConfig
from transformers.generation import StopStringCriteria

from tersor._compat import with_cache
from tersor.grids.blocks import Block
from tersor.grids.llamagen import LlamaGen, LlamaGenConfig, convert_llamagen
from tersor.grids.speculative import speculative_generate
from tersor.grids.zipar import zipar_generate


@pytest.mark.parametrize("key", ["model", "module", "state_dict", None])
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("kv_width", [64, 32])
def test_original_checkpoints_load_name_by_name(tmp_path, key, text, kv_width) -> None:
    weights = original_weights("raster text" if text else "raster", kv_width=kv_width)
    torch.save(weights if key is None else {key: weights, "steps": 3}, tmp_path / "c.pt")
    model = convert_llamagen(tmp_path / "c.pt", grid_size=(4, 5), num_attention_heads=4)
    loaded = model.state_dict()
    assert loaded.keys() == weights.keys() - {"freqs_cis"}
    assert all(torch.equal(loaded[name], weights[name]) for name in loaded)
    config = model.config
    assert (config.num_key_value_heads, config.grid_size) == (kv_width // 16, (4, 5))
    assert (config.condition, config.default_guidance) == (("text", 7.5) if text else ("class", 2.0))
    given = {"text_features": torch.ones(1, 6, 12)} if text else {"class_labels": torch.tensor([3])}
    model.save_pretrained(tmp_path / "saved")
    again = LlamaGen.from_pretrained(tmp_path / "saved")
    assert torch.equal(model.generate(**given, do_sample=False), again.generate(**given, do_sample=False))


def test_what_sampling_left_in_the_model_is_no_weight(tmp_path) -> None:
    weights = original_weights()
    left = {"layers.0.attention.kv_cache.k_cache": torch.ones(2, 4, 8, 16)}
    torch.save({"model": {**weights, **left}}, tmp_path / "c.pt")
    model = convert_llamagen(tmp_path / "c.pt", grid_size=(4, 5), num_attention_heads=4)
    assert model.state_dict().keys() == weights.keys() - {"freqs_cis"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda w: broken(w, **{"norm.weight": None}), r"missing \['norm.weight'\]"),
        (lambda w: broken(w, **{"extra.weight": torch.ones(1)}), r"unknown \['extra.weight'\]"),
        (lambda w: broken(w, **{"output.weight": torch.ones(51, 64)}), r"output.weight: \(51, 64\), not \(50, 64\)"),
        (lambda w: broken(w, **{"tok_embeddings.weight": None}), "no LlamaGen checkpoint"),
        (lambda w: broken(w, **{"cls_embedding.embedding_table.weight": None}), "no LlamaGen checkpoint"),
        (lambda w: {"a": 1}, "no state dict"),
        (lambda w: [1], "no state dict"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message) -> None:
    torch.save(content(original_weights()), tmp_path / "c.pt")
    with pytest.raises(ValueError, match=message):
        convert_llamagen(tmp_path / "c.pt", grid_size=(4, 5), num_attention_heads=4)


def test_a_file_cannot_run_code(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"model": Evil()}, tmp_path / "c.pt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        convert_llamagen(tmp_path / "c.pt", grid_size=(4, 5))


def test_heads_are_known_for_published_widths_only(tmp_path) -> None:
    torch.save(original_weights(), tmp_path / "c.pt")
    with pytest.raises(ValueError, match="64 wide; give num_attention_heads"):
        convert_llamagen(tmp_path / "c.pt", grid_size=(4, 5))


@pytest.mark.parametrize("text", [False, True])
def test_one_forward_over_the_image_agrees_with_decoding(text) -> None:
    torch.manual_seed(0)
    model = LlamaGen(llamagen_config(**TEXT_CONDITION) if text else llamagen_config()).eval()
    given = {"class_labels": torch.tensor([0, 4])}
    if text:
        mask = torch.ones(2, 6)
        mask[0, :4] = 0
        given = {"text_features": torch.randn(2, 6, 10), "text_mask": mask}
    ids = model.generate(**given, guidance_scale=1.0, do_sample=False)
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids, **given)
    start = model.config.condition_tokens - 1
    assert torch.equal(out.logits[:, start:-1].argmax(-1), ids)
    nll = torch.nn.functional.cross_entropy(out.logits[:, start:-1].flatten(0, 1), ids.flatten())
    torch.testing.assert_close(out.loss, nll)


def test_training_drops_conditions_and_gradients_reach_every_weight() -> None:
    torch.manual_seed(0)
    model = LlamaGen(llamagen_config(condition_dropout=0.5)).train()
    ids = torch.randint(0, 40, (16, 12))
    model(input_ids=ids, class_labels=torch.zeros(16, dtype=torch.long), labels=ids).loss.backward()
    grads = {name: each.grad for name, each in model.named_parameters()}
    assert all(each is not None and each.abs().sum() > 0 for each in grads.values())
    used = grads["cls_embedding.embedding_table.weight"].abs().sum(-1) > 0
    assert used.nonzero().flatten().tolist() == [0, 5], "class 0, and the null class"


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        ({}, {"class_labels": torch.tensor([5])}, "from 0 to 4"),
        ({}, {"class_labels": torch.tensor([[1]])}, r"must be \[batch\]"),
        ({}, {"text_features": torch.zeros(1, 6, 10)}, "conditioned on a class"),
        (TEXT_CONDITION, {"class_labels": torch.tensor([1])}, "conditioned on text"),
        (TEXT_CONDITION, {"text_features": torch.zeros(1, 5, 9)}, "text_features must be"),
        ({}, {"class_labels": torch.tensor([1]), "beams": 3}, "does not take"),
    ],
)
def test_bad_conditions(config, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaGen(llamagen_config(**config)).generate(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": "image"}, "'class' or 'text'"),
        ({"condition_tokens": 3}, "must be 1"),
        ({"hidden_size": 30}, "multiple of 4 times"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
    ],
)
def test_bad_sizes(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        llamagen_config(**changes)


def test_several_tokens_on_a_filled_cache_need_a_mask() -> None:
    from transformers import DynamicCache

    model, cache = LlamaGen(llamagen_config()).eval(), DynamicCache()
    with torch.no_grad():
        model(class_labels=torch.tensor([1]), **with_cache(cache))
        with pytest.raises(ValueError, match="attention_mask"):
            model(input_ids=torch.ones(1, 2, dtype=torch.long), **with_cache(cache))


def test_the_published_sizes_are_as_published() -> None:
    config = LlamaGenConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    with torch.device("meta"):
        model = LlamaGen(config)
    assert 340e6 < sum(each.numel() for each in model.parameters()) < 345e6, "LlamaGen-L, 343 million"
    assert config.intermediate_size == 2816
    assert not isinstance(config, type(AutoConfig))


def drawing(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("decode", [LlamaGen.generate, zipar_generate, speculative_generate])
def test_an_image_of_a_batch_is_the_image_that_its_generator_makes_alone(decode) -> None:
    model, labels = LlamaGen(llamagen_config(initializer_range=0.3)).eval(), torch.tensor([3, 0, 3])
    together = decode(model, labels, do_sample=True, generator=drawing(7, 8, 9))
    assert len(together.unique(dim=0)) == 3
    for index, seed in enumerate((7, 8, 9)):
        alone = decode(model, labels[index : index + 1], do_sample=True, generator=drawing(seed))
        assert torch.equal(alone[0], together[index])
        assert torch.equal(alone, decode(model, [int(labels[index])], do_sample=True, generator=drawing(seed)[0]))


@pytest.mark.parametrize("decode", [LlamaGen.generate, zipar_generate, speculative_generate])
def test_guidance_ends_after_so_many_cells(decode) -> None:
    """Those before are the guided image's, those after follow the condition alone."""
    model, labels = LlamaGen(llamagen_config(initializer_range=0.3)).eval(), torch.tensor([3, 0])
    options = {"do_sample": False, "guidance_scale": 6.0}
    if decode is zipar_generate:
        options["window_size"] = model.config.grid_size[1]  # raster order
    guided, plain = decode(model, labels, **options), decode(model, labels, do_sample=False, guidance_scale=1.0)
    for interval in (0, 7, 50):
        found = decode(model, labels, cfg_interval=interval, **options)
        assert torch.equal(found[:, : interval + 1], guided[:, : interval + 1])
        logits = model(input_ids=found[:, :-1], class_labels=labels).logits
        assert torch.equal(logits.argmax(-1)[:, interval + 1 :], found[:, interval + 1 :])
        assert torch.equal(found, guided) == (interval == 50)
    assert not torch.equal(guided, plain)
    assert torch.equal(decode(model, labels, cfg_interval=-1, **options), guided)


def test_several_images_of_a_class_and_the_output_of_a_dictionary() -> None:
    model, labels = LlamaGen(llamagen_config(initializer_range=0.3)).eval(), torch.tensor([3, 0])
    found = model.generate(
        labels, do_sample=True, num_return_sequences=2, generator=drawing(1, 2, 3, 4), return_dict_in_generate=True
    ).sequences
    assert torch.equal(found, model.generate([3, 3, 0, 0], do_sample=True, generator=drawing(1, 2, 3, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "only sampling and greedy do"),
        ({"max_new_tokens": 5}, "fixed length"),
        ({"output_hidden_states": True}, "output_hidden_states is not available"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature=nan must be a number above 0|temperature"),
        ({"do_sample": True, "temperature": float("inf")}, "temperature=inf must be a number above 0"),
        ({"guidance_scale": -1.0}, "must not be negative"),
        ({"guidance_scale": 1.0, "cfg_interval": 3}, "there is none"),
        ({"cfg_interval": 1.5}, "cfg_interval=1.5 must be"),
        ({"generator": drawing(1, 2, 3)}, "3 generators for 2 images"),
        ({"generator": [1, 2]}, "must be a torch.Generator"),
        ({"generator": 3}, "must be a torch.Generator"),
        ({"text_mask": torch.ones(2, 3)}, "conditioned on a class"),
        ({"stopping_criteria": [StopStringCriteria.__new__(StopStringCriteria)]}, "StopStringCriteria.* do not apply"),
        ({"past_key_values": 1}, "does not take"),
    ],
)
@pytest.mark.parametrize("decode", [LlamaGen.generate, zipar_generate, speculative_generate])
def test_what_cannot_be_met_is_refused_before_the_first_forward(decode, options, message, monkeypatch) -> None:
    model = LlamaGen(llamagen_config()).eval()
    monkeypatch.setattr(Block, "forward", lambda *_: pytest.fail("a forward"))
    with pytest.raises(ValueError, match=message):
        decode(model, torch.tensor([3, 0]), **options)


def test_scores_are_kept_where_they_can_be() -> None:
    model = LlamaGen(llamagen_config()).eval()
    with pytest.raises(ValueError, match="speculative_generate gives these images"):
        model.generate([1], output_scores=True, return_dict_in_generate=True)
    assert len(speculative_generate(model, [1], output_scores=True, return_dict_in_generate=True).scores) == 12


def test_time_may_run_out() -> None:
    with pytest.raises(TimeoutError, match="max_time"):
        LlamaGen(llamagen_config()).eval().generate([1], max_time=0.0)

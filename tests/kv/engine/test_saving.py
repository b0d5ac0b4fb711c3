"""Caches as files: what is loaded goes on as if nothing had happened, and nothing else is taken for it."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from methods import METHODS
from safetensors import safe_open
from safetensors.torch import save_file
from small_configs import small_model
from tiny_models import build, prompt

from tersor._compat import with_cache
from tersor.kv.engine.cache import CompressedCache
from tersor.kv.engine.saving import DOCUMENT, SavedCacheError, weights_sample
from tersor.kv.recipe import Recipe
from tersor.kv.saved import load_cache
from tersor.kv.zipcache import ZipCache

RECIPE = ZipCache(streaming_gap=10, min_tokens_to_compress=8)
NEW = {"max_new_tokens": 12, "do_sample": False}

GO_ON = """
import json, sys
from pathlib import Path
from transformers import AutoModelForCausalLM
from tersor._compat import with_cache
from tersor.kv.saved import load_cache

model, texts = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval(), {}
for file in sorted(Path(sys.argv[2]).glob("*.safetensors")):
    cache = load_cache(file, model.config)
    with cache.choices.on(model):
        written = model.generate(cache.input_ids, **with_cache(cache), max_new_tokens=12, do_sample=False)
    texts[file.stem] = written.tolist()
print(json.dumps(texts))
"""


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def read(model, recipe, tokens: int = 44, steps: int = 6) -> tuple[CompressedCache, torch.Tensor]:
    """A cache after a prompt and some tokens, and all tokens."""
    cache = recipe.cache(model.config)
    with recipe.on(model):
        ids = model.generate(
            prompt(1, tokens) % model.config.vocab_size, **with_cache(cache), max_new_tokens=steps, do_sample=False
        )
    return cache, ids


def saved(model, path: Path, recipe=RECIPE) -> Path:
    cache, ids = read(model, recipe)
    cache.save(path, input_ids=ids)
    return path


def test_another_process_goes_on_with_the_tokens_of_an_uninterrupted_run(llama, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "model")
    cases = {name: case.recipe for name, case in METHODS.items() if isinstance(case.recipe, Recipe)}
    assert len(cases) >= 10
    for name, recipe in cases.items():
        saved(llama, tmp_path / f"{name}.safetensors", recipe)
    command = [sys.executable, "-c", GO_ON, str(tmp_path / "model"), str(tmp_path)]
    texts = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert texts.keys() == cases.keys()
    for name, recipe in cases.items():
        whole, ids = read(llama, recipe)
        with recipe.on(llama):
            assert texts[name] == llama.generate(ids, **with_cache(whole), **NEW).tolist(), name


@pytest.mark.parametrize("name", ["gemma3", "mistral", "qwen2", "qwen3", "falcon_h1"])
def test_layers_of_the_librarys_own_are_kept_too(name: str, tmp_path: Path) -> None:
    net = small_model("falcon_h1", "FalconH1ForCausalLM") if name == "falcon_h1" else build(name)
    recipe = ZipCache(streaming_gap=10, min_tokens_to_compress=8, subtract_key_bias=name == "qwen2")
    path = saved(net, tmp_path / "cache", recipe)
    cache, (whole, ids) = load_cache(path, net.config), read(net, recipe)
    assert torch.equal(cache.input_ids, ids)
    with recipe.on(net):
        expected, found = (net.generate(ids, **with_cache(each), **NEW).tolist() for each in (whole, cache))
    assert found == expected


def test_a_padded_batch_with_a_key_bias_goes_on(tmp_path: Path) -> None:
    net, recipe = build("qwen2"), ZipCache(streaming_gap=10, min_tokens_to_compress=8, subtract_key_bias=True)
    ids, mask = prompt(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[1, :9] = 0
    whole = recipe.cache(net.config)
    with recipe.on(net), torch.no_grad():
        net(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), **with_cache(whole))
        whole.save(tmp_path / "cache", input_ids=ids)
        cache = load_cache(tmp_path / "cache", net.config)
        with pytest.raises(SavedCacheError.__base__, match="lacks the model's key bias"):
            cache.dequantize(0)
        longer = torch.cat([ids, prompt(2, 1, seed=3)], 1), torch.cat([mask, mask.new_ones(2, 1)], 1)
        expected, found = (
            net.generate(longer[0], attention_mask=longer[1], **with_cache(each), **NEW).tolist()
            for each in (whole, cache)
        )
    assert found == expected


def test_it_takes_the_bytes_of_the_cache(llama, tmp_path: Path) -> None:
    cache, _ = read(llama, ZipCache(), tokens=800)
    cache.save(tmp_path / "cache")
    loaded = load_cache(tmp_path / "cache", llama.config)
    assert loaded.memory_footprint() == cache.memory_footprint()
    assert loaded.summary() == cache.summary()
    assert (tmp_path / "cache").stat().st_size < cache.memory_footprint() + 20_000


def test_other_weights_are_refused_in_the_first_forward(llama, tmp_path: Path) -> None:
    path = saved(llama, tmp_path / "cache")
    for name in ("model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"):
        other = build("llama")
        other.get_parameter(name).data.flatten()[0] += 1e-3
        cache = load_cache(path, other.config)
        with RECIPE.on(other), pytest.raises(SavedCacheError, match="filled by other weights"):
            other.generate(cache.input_ids, **with_cache(cache), **NEW)
    half = build("llama", dtype=torch.bfloat16)
    cache = load_cache(path, half.config)
    with RECIPE.on(half), pytest.raises(SavedCacheError, match="in another precision"):
        half.generate(cache.input_ids, **with_cache(cache), **NEW)


def test_the_sample_of_weights_sees_every_parameter(llama) -> None:
    samples = {weights_sample(llama)}
    for name, _ in llama.named_parameters():
        other = build("llama")
        other.get_parameter(name).data.mul_(1.001)
        samples.add(weights_sample(other))
    assert len(samples) == 1 + len(list(llama.parameters()))
    assert weights_sample(build("llama")) in samples


def test_another_models_cache_is_refused_by_name(llama, tmp_path: Path) -> None:
    path = saved(llama, tmp_path / "cache")
    with pytest.raises(SavedCacheError, match=r"model_type, layer_types differ .model_type 'llama' there"):
        load_cache(path, build("qwen3").config)
    config = build("llama").config
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 5e5}
    with pytest.raises(SavedCacheError, match="rope_parameters differ"):
        load_cache(path, config)


def test_every_flipped_byte_and_every_cut_is_found(llama, tmp_path: Path) -> None:
    path = saved(llama, tmp_path / "cache")
    whole = path.read_bytes()
    places = [*range(0, len(whole), len(whole) // 150), 8, 9, len(whole) - 1]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        with pytest.raises(SavedCacheError):
            load_cache(path, llama.config)
        path.write_bytes(whole[:place])
        with pytest.raises(SavedCacheError):
            load_cache(path, llama.config)


def rewritten(path: Path, change) -> Path:
    """The file with a changed document and a checksum that fits it."""
    from tersor.kv.engine.saving import CHECKSUM, _checksum

    with safe_open(str(path), framework="pt") as file:
        document = json.loads(file.metadata()[DOCUMENT])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(document, tensors)
    text = json.dumps(document)
    save_file(tensors, path, metadata={DOCUMENT: text, CHECKSUM: _checksum(text, tensors)})
    return path


def test_what_does_not_fit_is_refused_even_where_the_checksum_does(llama, tmp_path: Path) -> None:
    def newer(document, tensors):
        document["version"] += 1

    def other_settings(document, tensors):
        document["method"] = document["method"].replace("streaming_gap=10", "streaming_gap=11")

    def fewer_layers(document, tensors):
        document["layers"].pop()

    def outside(document, tensors):
        next(x for name, x in tensors.items() if name.endswith("positions"))[:] = 10**6

    def longer(document, tensors):
        entries = dict(document["layers"][0]["dict"])
        document["layers"][0]["dict"] = [[k, v + 1 if k == "seen" else v] for k, v in entries.items()]

    def lost(document, tensors):
        del tensors["layers.1.buffer.slots.0"]

    for change, message in {
        newer: "format 2, and this release of tersor reads format 1",
        other_settings: "other settings",
        fewer_layers: "no cache of this shape",
        outside: "holds other tokens than its own",
        longer: r"holds 49 of 50 tokens",
        lost: "no cache of this shape",
    }.items():
        path = rewritten(saved(llama, tmp_path / "cache"), change)
        with pytest.raises(SavedCacheError, match=message):
            load_cache(path, llama.config)


def test_what_is_no_cache_is_refused(llama, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(SavedCacheError, match="no cache that tersor saved"):
        load_cache(tmp_path / "weights", llama.config)
    with pytest.raises(SavedCacheError, match="no such file"):
        load_cache(tmp_path / "nothing", llama.config)
    with pytest.raises(SavedCacheError, match="filled inside"):
        RECIPE.cache(llama.config).save(tmp_path / "empty")
    cache, ids = read(llama, RECIPE)
    with pytest.raises(SavedCacheError, match="are 12 tokens a row"):
        cache.save(tmp_path / "short", input_ids=ids[:, :12])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["weights"]


def test_choices_of_ones_own_are_passed_again(llama, tmp_path: Path) -> None:
    method = METHODS["choices of one's own"].recipe
    path = saved(llama, tmp_path / "cache", method)
    with pytest.raises(SavedCacheError, match="choices of its own"):
        load_cache(path, llama.config)
    with pytest.raises(SavedCacheError, match="other settings"):
        CompressedCache.load(path, llama.config, RECIPE.method())
    assert CompressedCache.load(path, llama.config, method).get_seq_length() == 49


def test_a_loaded_cache_goes_on_in_a_session_only(llama, tmp_path: Path) -> None:
    cache = load_cache(saved(llama, tmp_path / "cache"), llama.config)
    with pytest.raises(RuntimeError, match="goes on inside"), torch.no_grad():
        llama(prompt(1, 1), **with_cache(cache))


def test_a_copy_is_saved_as_the_cache_itself(llama, tmp_path: Path) -> None:
    cache, ids = read(llama, RECIPE)
    copy.deepcopy(cache).save(tmp_path / "copy", input_ids=ids)
    cache.save(tmp_path / "cache", input_ids=ids)
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "cache").read_bytes()
    # A pickle lost its model.
    with pytest.raises(SavedCacheError, match="whose model is still there"):
        pickle.loads(pickle.dumps(cache)).save(tmp_path / "pickle")


def test_a_loaded_cache_can_be_saved_again_before_it_is_used(llama, tmp_path: Path) -> None:
    path = saved(llama, tmp_path / "cache")
    load_cache(path, llama.config).save(tmp_path / "again", input_ids=prompt(1, 49))
    assert load_cache(tmp_path / "again", llama.config).summary()["tokens"] == 49

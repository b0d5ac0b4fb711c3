"""The vision-language bench: what it counts, and that it asks what a user would."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tersor import zoo
from tersor.kv.bench.vision import DENSE, VARIANTS, prompt, random_visual, ratio_by_tiles, run_all, run_method, tasks
from tersor.kv.zipvl import ZipVL


@pytest.fixture(scope="module")
def model():
    return zoo.load_model("tiny-vlm")


@pytest.fixture(scope="module")
def processor():
    return zoo.load_processor("tiny-vlm")


@pytest.fixture(scope="module")
def compared(model, processor):
    return run_all(model, processor, tasks(3, seed=13), taus=(0.8,))


def test_answers_are_those_of_generate(model, processor) -> None:
    """One forward and the next word is what a user's `generate` writes, dense and sparse."""
    drawn = tasks(2, seed=11)
    recipe = ZipVL(tau=0.9, min_tokens=0).method()
    for choose in (None, lambda batch: recipe):
        outcome = run_method(model, processor, drawn, choose)
        for index, task in enumerate(drawn):
            inputs = prompt(processor, [task])
            if choose is None:
                written = model.generate(**inputs, max_new_tokens=1, do_sample=False)
            else:
                with recipe.on(model):
                    written = model.generate(**inputs, max_new_tokens=1, do_sample=False)
            said = processor.tokenizer.convert_ids_to_tokens(int(written[0, -1]))
            assert outcome.first[index] == float(said == task.first.answer)


def test_at_tau_1_everything_is_dense(model, processor) -> None:
    drawn = tasks(4, seed=12)
    dense = run_method(model, processor, drawn, None)
    same = run_method(model, processor, drawn, lambda batch: ZipVL(tau=1.0, min_tokens=0, policy="keep").method())
    assert (same.first, same.second) == (dense.first, dense.second)
    assert same.ratio == dense.ratio == 1.0
    assert same.layer_ratios() == [1.0] * model.config.text_config.num_hidden_layers


@pytest.mark.parametrize("label", VARIANTS)
def test_simple_choices_keep_as_much_as_zipvl(model, processor, compared, label: str) -> None:
    ours = compared[f"ZipVL evict 0.8{label}"]
    assert 0.05 < ours.ratio < 0.95
    for name in ("fixed share 0.8", "random 0.8", "ZipVL quantize 0.8"):
        assert compared[name + label].ratio == pytest.approx(ours.ratio, abs=0.01), name
    assert compared[f"random 0.8{label}"].layer_ratios() == pytest.approx(ours.layer_ratios(), abs=0.01)
    sparse = 1 if VARIANTS[label].get("skip_layers") else 0
    assert ours.layer_ratios()[:sparse] == [1.0] * sparse
    fixed = compared[f"fixed share 0.8{label}"].layer_ratios()
    assert fixed[:sparse] == [1.0] * sparse
    assert len(set(np.round(fixed[sparse:], 2))) == 1


def test_ratios_are_counted_by_question(compared) -> None:
    ours = compared["ZipVL evict 0.8"]
    assert len(ours.ratios_of("color")) == len(ours.ratios_of("color", 1)) == 3
    by_count = [ratio for needed in range(5) for ratio in ours.ratios_of("count", needed)]
    assert sorted(by_count) == sorted(ours.ratios_of("count"))
    assert compared[DENSE].kv_bytes == compared[DENSE].dense_bytes * 2  # the model is in float32 here


def test_an_interrupted_run_goes_on_and_other_tasks_are_refused(model, processor, tmp_path: Path) -> None:
    drawn, file = tasks(1, seed=15), tmp_path / "progress.json"

    def stop(name: str) -> None:
        if name.startswith("random"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(model, processor, drawn, taus=(0.9,), on_progress=stop, progress=file)
    kept = json.loads(file.read_text())["done"]
    assert "fixed share 0.9" in kept
    assert "random 0.9" not in kept
    resumed = run_all(model, processor, drawn, taus=(0.9,), progress=file)
    assert resumed == run_all(model, processor, drawn, taus=(0.9,))
    with pytest.raises(ValueError, match="other settings"):
        run_all(model, processor, tasks(1, seed=16), taus=(0.9,), progress=file)


def test_random_choices_differ_between_batches_and_keep_the_text(model, processor) -> None:
    task = tasks(1, seed=14)[0]
    inputs = prompt(processor, [task])
    text = (inputs["input_ids"][0] != processor.image_token_id).nonzero()[:, 0].tolist()
    kept = []
    for seed in (0, 0, 1):
        with random_visual([0.3] * 4, seed).on(model) as session, torch.no_grad():
            model(**inputs)
            kept.append([layer[0].tolist() for layer in session.stats.kept])
    assert kept[0] == kept[1] != kept[2]
    assert all(set(text) <= set(layer) for layer in kept[0])


def test_the_ratio_depends_on_what_there_is_to_see(model, processor) -> None:
    """Here more tiles draw the attention together, so that fewer tokens hold it."""
    ratios = {
        tiles: float(np.mean(own)) for tiles, own in ratio_by_tiles(model, processor, n=8, tau=0.9, seed=1).items()
    }
    assert list(ratios) == [1, 4, 8, 16]
    assert ratios[1] > ratios[4] > ratios[16] + 0.05

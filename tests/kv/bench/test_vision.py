"""The vision-language bench: what it counts, and that it asks what a user would."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tersor import zoo
from tersor.kv.bench import vision
from tersor.kv.bench.tiles import KINDS, READ_IN
from tersor.kv.bench.vision import (
    BATCH,
    DENSE,
    VARIANTS,
    Outcome,
    Task,
    against,
    prompt,
    random_visual,
    run_all,
    run_method,
    steps_kept,
    tasks,
)
from tersor.kv.zipvl import ZipVL


def small(n: int, seed: int) -> list[Task]:
    """Tasks on a grid that is read in a moment; with the question it is long enough to be read sparsely."""
    return tasks(n, seed=seed, grid=14)


@pytest.fixture(scope="module")
def model():
    return zoo.load_model("tiny-vlm")


@pytest.fixture(scope="module")
def processor():
    return zoo.load_processor("tiny-vlm")


@pytest.fixture(scope="module")
def compared(model, processor):
    return run_all(model, processor, small(1, seed=13), taus=(0.8,))


def test_answers_are_those_of_generate(model, processor) -> None:
    """One forward and the next word is what a user's `generate` writes, dense and sparse."""
    drawn = small(1, seed=11)
    recipe = ZipVL(tau=0.4).method()
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
    drawn = small(2, seed=12)
    dense = run_method(model, processor, drawn, None)
    same = run_method(model, processor, drawn, lambda batch: ZipVL(tau=1.0, policy="keep").method())
    assert (same.first, same.second) == (dense.first, dense.second)
    assert same.ratio == dense.ratio == 1.0
    assert same.layer_ratios() == same.visual_ratios() == [1.0] * model.config.text_config.num_hidden_layers


@pytest.mark.parametrize("label", VARIANTS)
def test_simple_choices_keep_as_much_as_zipvl(compared, label: str) -> None:
    ours, random, fixed = (compared[f"{name} 0.8{label}"] for name in ("ZipVL evict", "random", "fixed share"))
    assert 0.05 < ours.ratio < 0.95
    assert fixed.ratio == pytest.approx(ours.ratio, abs=0.01)
    assert random.visual_ratios() == pytest.approx(ours.visual_ratios(), abs=0.01)
    dense = len(VARIANTS[label].get("skip_layers", ()))
    assert ours.layer_ratios()[:dense] == random.layer_ratios()[:dense] == fixed.layer_ratios()[:dense] == [1.0] * dense
    assert len(set(np.round(fixed.layer_ratios()[dense:], 2))) == 1


def test_figures_are_counted_by_question(compared) -> None:
    ours = compared["ZipVL evict 0.8"]
    assert [len(ours.of_kind(kind)) for kind in KINDS] == [1] * 3
    assert sorted(value for kind in KINDS for value in ours.of_kind(kind, ours.ratios)) == sorted(ours.ratios)
    assert compared[DENSE].kv_bytes == compared[DENSE].dense_bytes * 2  # the model is in float32 here
    assert compared["ZipVL quantize 0.8"].kv_bytes < ours.kv_bytes


def test_cells_that_are_read_are_looked_for_in_their_layer(model, processor) -> None:
    task = small(1, seed=14)[-1]
    inputs = prompt(processor, [task])
    with ZipVL(tau=0.9).on(model) as session, torch.no_grad():
        model(**inputs)
        stats = session.stats
    first = int((inputs["input_ids"][0] == processor.image_token_id).nonzero()[0])
    expected = [
        first + 14 * row + column in stats.kept[layer][0].tolist()
        for layer, (row, column) in zip(READ_IN, task.first.steps, strict=True)
    ]
    assert steps_kept(stats, [task.first], inputs, processor) == [sum(expected) / 3]
    nothing = random_visual([0.0] * 8, 0)
    outcome = run_method(model, processor, [task], lambda batch: nothing)
    assert outcome.read == [0.0]


def test_an_interrupted_run_goes_on_and_other_tasks_are_refused(
    model, processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "VARIANTS", {"": {}})
    drawn, file = small(1, seed=15), tmp_path / "progress.json"

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
        run_all(model, processor, small(1, seed=16), taus=(0.9,), progress=file)


def test_random_choices_differ_between_batches_and_keep_the_text(model, processor) -> None:
    task = small(1, seed=14)[0]
    inputs = prompt(processor, [task])
    text = (inputs["input_ids"][0] != processor.image_token_id).nonzero()[:, 0].tolist()
    kept = []
    for seed in (0, 0, 1):
        with random_visual([0.3] * 8, seed).on(model) as session, torch.no_grad():
            model(**inputs)
            kept.append([layer[0].tolist() for layer in session.stats.kept])
            assert session.stats.visual_ratio == pytest.approx(0.3, abs=0.01)
    assert kept[0] == kept[1] != kept[2]
    assert all(set(text) <= set(layer) for layer in kept[0])


def test_second_questions_are_about_another_tile_of_the_same_picture() -> None:
    for task in small(5, seed=2):
        assert task.second.colour != task.first.colour
        assert task.picture.path(task.second.kind, task.second.colour)[-1].value == task.second.answer


def test_a_random_choice_is_judged_by_its_draws() -> None:
    """Two draws, one all right and one all wrong: 50 answers are two observations, not fifty."""
    random = Outcome(first=[1.0] * BATCH + [0.0] * BATCH)
    dense = Outcome(first=[1.0] * (2 * BATCH))
    by_draw, by_task = against(random, dense, drawn=True), against(random, dense)
    assert by_draw.value == by_task.value == -0.5
    assert (by_draw.low, by_draw.high) == (-1.0, 0.0) and -0.8 < by_task.low < by_task.high < -0.2


def test_a_dense_first_layer_does_not_carry_the_picture(model, processor) -> None:
    """What makes a row with dense first layers a claim: random tokens, as many in each layer, do not answer."""
    drawn = small(8, seed=99)
    recipe = ZipVL(tau=0.3, skip_layers=(0,)).method()
    ours = run_method(model, processor, drawn, lambda batch: recipe)
    shares = ours.visual_ratios()
    random = run_method(model, processor, drawn, lambda batch: random_visual(shares, batch))
    assert np.mean(ours.of_kind("look")) > np.mean(random.of_kind("look")) + 0.25
    assert np.mean(random.first) < 0.5

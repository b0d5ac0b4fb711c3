"""Scenes are told, drawn and recognized; every fault counts."""

from __future__ import annotations

import io
import random
from dataclasses import replace

import pytest
from PIL import Image

from tersor.opening.data import read_data
from tersor.opening.pictures import save_jpeg
from tersor.opening.records import Step
from tersor.opening.scenes import COLOURS, PLACES, SHAPES, describe, draw, faults, seen, told


@pytest.mark.parametrize("seed", range(40))
def test_a_scene_survives_words_and_jpeg(seed: int) -> None:
    rng = random.Random(seed)
    scene = {cell: (rng.choice(list(COLOURS)), rng.choice(SHAPES)) for cell in rng.sample(range(9), rng.randint(0, 9))}
    assert told(f"Now: {describe(scene)}.") == scene
    found, noise = seen(Image.open(io.BytesIO(save_jpeg(draw(scene)))))
    assert found == scene
    assert noise < 3


def test_words_name_places_whole() -> None:
    assert told("a red circle at the top left") == {0: ("red", "circle")}
    assert told("an orange circle at the top and more") == {1: ("orange", "circle")}
    assert told("a red circle") == told("a crimson circle at the top") == {}
    assert len(set(PLACES)) == 9


@pytest.fixture
def instance(mini_root):
    return next(each for each in read_data(mini_root).instances if len(each.gold) >= 3)


def test_each_kind_of_fault_counts(instance, tmp_path) -> None:
    gold = list(instance.gold)
    assert faults(instance, gold) == 0
    assert faults(instance, gold[:-1]) == 3
    assert faults(instance, [*gold, gold[0]]) == 1
    assert faults(instance, [replace(gold[0], image=None), *gold[1:]]) == 2
    scene = told(gold[0].text)
    (cell,) = list(scene)[:1]
    other = next(each for each in COLOURS if each != scene[cell][0])
    (tmp_path / "wrong.jpg").write_bytes(save_jpeg(draw(scene | {cell: (other, scene[cell][1])})))
    assert faults(instance, [replace(gold[0], image=tmp_path / "wrong.jpg"), *gold[1:]]) == 1
    assert faults(instance, [Step("nothing", gold[0].image), *gold[1:]]) == len(scene)


def test_noise_counts_a_half(instance, tmp_path) -> None:
    noisy = Image.effect_noise((96, 96), 60).convert("RGB")
    picture = Image.blend(draw(told(instance.gold[0].text)), noisy, 0.3)
    (tmp_path / "noisy.jpg").write_bytes(save_jpeg(picture))
    answer = [replace(instance.gold[0], image=tmp_path / "noisy.jpg"), *instance.gold[1:]]
    assert faults(instance, answer) == 0.5

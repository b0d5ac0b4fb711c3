"""tiny-vlm-small is what its card says, and its recipe still makes it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from vlm_small.tiles import samples

from tersor import zoo


@pytest.fixture(scope="module")
def lock() -> dict:
    return json.loads((zoo.path("tiny-vlm-small") / "recipe.lock.json").read_text())


def test_it_is_a_real_qwen_and_scores_as_the_card_says(lock: dict) -> None:
    from vlm_small.export import score

    model, processor = zoo.load_model("tiny-vlm-small"), zoo.load_processor("tiny-vlm-small")
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    assert lock["grid"] ** 2 >= 256
    assert lock["minutes"] <= 60
    assert lock["scores"]["color"]["share"] >= 0.95
    assert lock["scores"]["count"]["share"] >= 0.90
    shares = score(model, processor, grid=lock["grid"], n=64, seed=5)
    card = zoo.card("tiny-vlm-small")
    for kind, each in lock["scores"].items():
        assert f"{100 * each['share']:.1f} [{100 * each['low']:.1f}, {100 * each['high']:.1f}]" in card
        # Four standard deviations of 64 draws.
        assert abs(shares[kind]["share"] - each["share"]) < 0.15


def test_models_without_a_picture_processor_say_so() -> None:
    with pytest.raises(ValueError, match="reads no pictures"):
        zoo.load_processor("tiny-lm")


def test_training_sees_pictures_as_the_processor_gives_them() -> None:
    from vlm.processor import patches

    processor = zoo.load_processor("tiny-vlm-small")
    pixels = np.stack([shown.pixels for shown, _ in samples(2, kind="count", seed=1, grid=4)])
    text = "<bos> <|vision_start|><|image_pad|><|vision_end|> count red"
    inputs = processor(text=[text] * 2, images=list(pixels), return_tensors="pt")
    image = processor.image_processor
    assert torch.equal(inputs["pixel_values"], patches(pixels, image.image_mean, image.image_std))


def test_questions_of_one_picture_differ_and_labels_are_their_answers() -> None:
    from vlm_small.data import IGNORED, draw_batch

    processor = zoo.load_processor("tiny-vlm-small")
    batch = draw_batch(processor, np.random.default_rng(3), size=6, grid=4, turns=4, lookups=0.3)
    for ids, labels in zip(batch.inputs["input_ids"], batch.labels, strict=True):
        turns = processor.tokenizer.convert_ids_to_tokens(ids[-16:].tolist())
        asked = [tuple(turns[start : start + 2]) for start in range(0, 16, 4)]
        assert len(set(asked)) == 4
        assert (labels == IGNORED).sum() == len(ids) - 8
        known = labels[-16:] != IGNORED
        assert torch.equal(labels[-16:][known], ids[-16:][known])


@pytest.mark.slow
def test_the_recipe_runs_resumes_and_repeats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tiny_vlm_small

    locks = []
    for name in ("one", "two"):
        command = ["--out", str(tmp_path / name), "--smoke", "--threads", "1"]
        assert tiny_vlm_small.main(command) == 0
        locks.append(json.loads((tmp_path / name / "tiny-vlm-small" / "recipe.lock.json").read_text()))
    assert [row["loss"] for row in locks[0]["curve"]] == [row["loss"] for row in locks[1]["curve"]]
    capsys.readouterr()
    assert tiny_vlm_small.main(["--out", str(tmp_path / "one"), "--smoke", "--threads", "1"]) == 0
    assert "'step'" not in capsys.readouterr().out  # nothing was left to train
    assert tiny_vlm_small.main(["--out", str(tmp_path / "one"), "--smoke", "--seed", "2"]) == 2
    assert "another plan or seed" in capsys.readouterr().err

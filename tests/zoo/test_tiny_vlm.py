"""tiny-vlm is what its card says, reads the picture where it was taught to, and its recipe still makes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from tersor import zoo
from tersor.kv.bench.tiles import KINDS


@pytest.fixture(scope="module")
def lock() -> dict:
    return json.loads((zoo.path("tiny-vlm") / "recipe.lock.json").read_text())


def test_it_is_a_real_qwen_and_scores_as_the_card_says(lock: dict) -> None:
    from vlm.evaluation import score

    model, processor = zoo.load_model("tiny-vlm"), zoo.load_processor("tiny-vlm")
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    assert model.config._attn_implementation == "sdpa", "nothing of the training's attention is left"
    assert len(model.model.visual.blocks) == 0, "a visual token knows its own cell"
    assert lock["grid"] ** 2 == 1024 and lock["fillers"] == 66
    assert lock["minutes"] <= 15
    for kind, least in (("look", 0.95), ("chain", 0.9), ("trail", 0.9)):
        assert lock["scores"][kind]["share"] >= least and lock["scores"][kind]["n"] >= 1000
    shares, card = score(model, processor, grid=32, fillers=66, n=12, seed=5), zoo.card("tiny-vlm")
    for kind, each in lock["scores"].items():
        assert f"{100 * each['share']:.1f} [{100 * each['low']:.1f}, {100 * each['high']:.1f}]" in card
        assert shares[kind]["share"] > 0.8


def test_the_card_says_what_training_imposes() -> None:
    card = zoo.card("tiny-vlm")
    assert "Where the model reads the picture is taught, not found" in card and "left out" in card


def test_the_picture_is_read_in_three_layers_and_nowhere_else(lock: dict) -> None:
    """What makes random tokens fail whatever is dense: no first layer carries the picture to the question."""
    from vlm.evaluation import expected_right, mask_test

    model, processor = zoo.load_model("tiny-vlm"), zoo.load_processor("tiny-vlm")
    found = mask_test(model, processor, pictures=5, seed=3)
    assert len(found) == 12
    for table in (found, lock["reads"]):
        for view, shares in table.items():
            for kind in KINDS:
                share = shares[kind]["share"]
                assert share >= 0.95 if expected_right(view, kind) else share <= 0.45, (view, kind, share)
    assert not expected_right("not in layer 5", "trail") and expected_right("not in layer 5", "look")
    assert not any(expected_right("only before layer 3", kind) for kind in KINDS)


def test_a_model_that_reads_early_fails_the_mask_test() -> None:
    """The test can fail: shifted by one layer, reads are elsewhere."""
    from vlm.evaluation import expected_right, mask_test

    model, processor = zoo.load_model("tiny-vlm"), zoo.load_processor("tiny-vlm")
    layers = model.model.language_model.layers
    with torch.no_grad():
        for weights, others in zip(layers[2].parameters(), layers[3].parameters(), strict=True):
            weights.copy_(others)
        for weights in layers[3].self_attn.o_proj.parameters():
            weights.zero_()
    found = mask_test(model, processor, pictures=2, seed=3)
    assert found["not in layer 3"]["look"]["share"] > 0.45 or found["everywhere"]["look"]["share"] < 0.95
    assert not expected_right("not in layer 3", "look") and expected_right("everywhere", "look")


@pytest.mark.slow
def test_the_recipe_runs_resumes_and_repeats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tiny_vlm

    locks = []
    for name in ("one", "two"):
        command = ["--out", str(tmp_path / name), "--smoke", "--threads", "1"]
        assert tiny_vlm.main(command) == 0
        locks.append(json.loads((tmp_path / name / "tiny-vlm" / "recipe.lock.json").read_text()))
    assert [row["loss"] for row in locks[0]["curve"]] == [row["loss"] for row in locks[1]["curve"]]
    capsys.readouterr()
    assert tiny_vlm.main(["--out", str(tmp_path / "one"), "--smoke", "--threads", "1"]) == 0
    assert "'step'" not in capsys.readouterr().out  # nothing was left to train
    assert tiny_vlm.main(["--out", str(tmp_path / "one"), "--smoke", "--without-left-out"]) == 2
    assert "another plan or seed" in capsys.readouterr().err

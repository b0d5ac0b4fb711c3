"""`tersor drag clip`, `tersor train drag` and `tersor drag render`, one after the other, on a tiny SVD."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from drag_models import svd
from PIL import Image

from tersor.cli import run
from tersor.drag.scene import Entity, Scene

SIDE, FRAMES = 16, 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("svd")
    svd().save_pretrained(folder)
    return folder


def film(folder: Path) -> None:
    """Frames and masks of a square that moves."""
    rng = np.random.default_rng(0)
    for frame in range(FRAMES):
        mask = np.zeros((20, 24), np.uint8)
        mask[4:14, 3 + 2 * frame : 13 + 2 * frame] = 5
        for name, picture in (("images", rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)), ("masks", mask)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / name / f"{frame:05}.png")


def test_from_a_film_with_masks_to_a_video(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film(tmp_path)
    clips, out = tmp_path / "clips", tmp_path / "run"
    data = ["drag", "clip", "--video", str(tmp_path / "images"), "--masks", str(tmp_path / "masks"), "--out",
            str(clips), "--name", "film", "--json"]  # fmt: skip
    assert run(data) == 0
    assert json.loads(capsys.readouterr().out) == {"frames": FRAMES, "clip": "film", "out": str(clips)}
    # As in diffusers' scripts, and as everywhere here.
    command = ["train", "drag", "--pretrained_model_name_or_path", str(base), "--train-data-dir", str(clips),
               f"--output_dir={out}", "--max-train-steps", "2", "--num_frames", str(FRAMES), "--height", str(SIDE),
               "--width", str(SIDE), "--lr-warmup-steps", "0", "--learning_rate", "1e-3", "--json"]  # fmt: skip
    assert run(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["updates"], told["clips"], told["controlnet"]) == (2, 1, str(out / "controlnet"))
    assert run(command) == 0, "a finished run ends at once"
    assert run([*command, "--seed", "1"]) == 2
    assert "belongs to another run" in capsys.readouterr().err
    mask = np.zeros((SIDE, SIDE), bool)
    mask[3:11, 2:10] = True
    Scene(SIDE, SIDE, FRAMES, (Entity(mask, [(6, 7), (9, 7)]),)).save(tmp_path / "scene.json")
    Image.new("RGB", (SIDE, SIDE), "teal").save(tmp_path / "first.png")
    render = ["drag", "render", str(tmp_path / "scene.json"), "--image", str(tmp_path / "first.png"), "--model",
              str(base), "--height", str(SIDE), "--width", str(SIDE), "--steps", "1", "--out",
              str(tmp_path / "video.gif")]  # fmt: skip
    assert run([*render, "--controlnet", str(out / "controlnet"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == FRAMES
    assert run(render) == 2
    assert "has no control branch; give --controlnet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-train-steps", "0"], "--max-train-steps 0 must be at least 1"),
        (["--max-train-steps", "1", "--loss_mask", "all"], "--loss-mask 'all' must be one of"),
        (["--max-train-steps", "1", "--num-frames", "0"], "--num-frames 0 must be at least 1"),
        (["--max-train-steps", "1", "--features", "clip"], "--features 'clip' must be one of"),
        (["--max-train-steps", "1", "--num_frames", "9"], "fewer than 9"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film(tmp_path)
    clips = tmp_path / "clips"
    assert run(["drag", "clip", "--video", str(tmp_path / "images"), "--masks", str(tmp_path / "masks"), "--out",
                str(clips)]) == 0  # fmt: skip
    capsys.readouterr()
    command = ["train", "drag", "--pretrained-model-name-or-path", str(tmp_path / "none"), "--train-data-dir",
               str(clips), "--output-dir", str(tmp_path / "run"), "--num-frames", str(FRAMES)]  # fmt: skip
    assert run([*command, *options]) == 2
    line = capsys.readouterr().err.strip()
    assert said in line and "\n" not in line
    assert not (tmp_path / "run").exists()


def test_a_name_that_leads_out_of_the_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film(tmp_path)
    assert run(["drag", "clip", "--video", str(tmp_path / "images"), "--masks", str(tmp_path / "masks"), "--out",
                str(tmp_path / "clips"), "--name", "../other"]) == 2  # fmt: skip
    assert "must be the name of a folder" in capsys.readouterr().err

"""`tersor drag`: from a scene and a picture to a video, and what it came to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from drag_models import SIDE, branch, entities, picture, square, svd
from invoke import run
from PIL import Image
from safetensors.torch import save_file

from tersor.drag.cli import drag, measured
from tersor.drag.features import VaeFeatures
from tersor.drag.scene import Entity, Scene
from tersor.drag.tracking import TemplateTracker


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SVD, a branch, a picture and a scene, as a user has them."""
    folder = tmp_path_factory.mktemp("drag")
    pipe = svd()
    pipe.save_pretrained(folder / "svd")
    record = VaeFeatures(pipe.vae, str(folder / "svd")).record
    own = branch(pipe.unet, seed=5, entity_embedding_out_channels=(2, 8), entity_features=record)
    own.save_pretrained(folder / "branch")
    save_file(own.state_dict(), folder / "branch.safetensors")
    picture().save(folder / "first.png")
    Scene(SIDE, SIDE, 3, tuple(entities())).save(folder / "scene.json")
    return folder


def render(home: Path, **changes: str) -> str:
    options = {
        "image": str(home / "first.png"), "model": str(home / "svd"), "controlnet": str(home / "branch"), "steps": "2",
        "height": "32", "width": "32", "out": str(home / "video.gif"), **changes,
    }  # fmt: skip
    scene = options.pop("scene", str(home / "scene.json"))
    return run(
        drag, "render", scene, *(each for name, value in options.items() for each in (f"--{name}", value))
    ).output


def test_a_scene_becomes_a_video_that_is_measured(home) -> None:
    assert "3 frames of 32 x 32" in render(home)
    with Image.open(home / "video.gif") as film:
        assert film.n_frames == 3 and film.size == (32, 32)
    first = (home / "video.gif").read_bytes()
    render(home)
    assert (home / "video.gif").read_bytes() == first
    render(home, scale="0")
    assert (home / "video.gif").read_bytes() != first
    found = run(drag, "evaluate", str(home / "scene.json"), "--video", str(home / "video.gif"), "--json").stdout
    rows = json.loads(found)
    assert rows["still picture"]["objmc_mean"] > 0 and rows["video"]["points"] == 6
    assert "still picture" in run(drag, "evaluate", str(home / "scene.json"), "--video", str(home / "video.gif")).output


def test_a_video_that_does_what_was_asked_is_near_its_paths() -> None:
    rng = np.random.default_rng(0)
    ground, thing = rng.integers(90, 110, (48, 48, 3)), rng.integers(0, 256, (13, 13, 3))
    frames = []
    for step in range(5):
        pixels = ground.copy()
        pixels[10 + step : 23 + step, 6 + 3 * step : 19 + 3 * step] = thing
        frames.append(Image.fromarray(pixels.astype(np.uint8)))
    scene = Scene(48, 48, 5, (Entity(square(10, 6, 13, side=48), [(0, 0), (12, 4)]),))
    rows = measured(scene, frames, TemplateTracker())
    assert rows["video"].objmc_mean < 0.3 < 5 < rows["still picture"].objmc_mean
    large = measured(scene, [frame.resize((96, 96), Image.Resampling.NEAREST) for frame in frames], TemplateTracker())
    assert large["still picture"].objmc_mean == pytest.approx(2 * rows["still picture"].objmc_mean, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "video.mp4"}, "must end in .gif"),
        ({"steps": "0"}, "--steps 0"),
        ({"features": "colour"}, "--features 'colour' must be one of"),
        ({"features": "dino"}, "--features 'dino' must be one of"),
        ({"scene": "/no/scene.json"}, "no such scene"),
        ({"image": "/no/picture.png"}, "picture.png"),
        ({"controlnet": "/no/branch"}, "/no/branch"),
    ],
)
def test_slips_are_refused_in_one_line(home, changes, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        render(home, **changes)
    assert "\n" not in str(error.value)


def test_a_picture_of_another_size_and_features_of_another_kind_are_refused(home, tmp_path) -> None:
    picture().resize((16, 16)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"is \(16, 16\), the scene \(32, 32\)"):
        render(home, image=str(tmp_path / "small.png"))
    from transformers import Dinov2Config, Dinov2Model

    Dinov2Model(Dinov2Config(hidden_size=4, num_hidden_layers=1, num_attention_heads=2, patch_size=8,
                             image_size=32)).save_pretrained(tmp_path / "dino")  # fmt: skip
    with pytest.raises(ValueError, match="trained on features with kind='vae'"):
        render(home, features=f"dino:{tmp_path / 'dino'}")


def test_only_the_published_branch_is_converted(home) -> None:
    with pytest.raises(ValueError, match="is no such branch: missing"):
        run(drag, "convert", str(home / "branch.safetensors"), "--out", str(home / "converted"))
    assert not (home / "converted").exists()

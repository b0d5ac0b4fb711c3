"""tiny-drag is what its card says: a real SVD pipeline whose branch moves what it is told to move."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from PIL import Image

from tersor import zoo
from tersor._errors import TersorError
from tersor.drag.bench.arms import videos
from tersor.drag.bench.table import outcome
from tersor.drag.bench.world import FRAMES, SIDE, World
from tersor.drag.loading import load_pipeline
from tersor.drag.maps import Tracks, gaussian_maps
from tersor.drag.scene import Entity, Scene

NAME = "tiny-drag"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(NAME)


def test_it_is_a_real_pipeline_of_a_few_megabytes(pipe: Any) -> None:
    assert type(pipe.unet) is UNetSpatioTemporalConditionModel and pipe.unet.dtype == torch.float32
    files = [each for each in zoo.path(NAME).rglob("*") if each.is_file()]
    assert sum(each.stat().st_size for each in files) < 12e6
    with pytest.raises(TersorError, match="is a pipeline; load it with"):
        zoo.load_model(NAME)


def test_the_card_quotes_the_lock(pipe: Any) -> None:
    card, lock = zoo.card(NAME), json.loads((zoo.path(NAME) / "recipe.lock.json").read_text())
    for part, count in lock["parameters"].items():
        assert f"{count:,}" in card and count == sum(each.numel() for each in getattr(pipe, part).parameters())
    assert f"{lock['scores']['vae']['psnr']:.1f} dB" in card and f"{lock['minutes']:.0f} minutes" in card
    assert lock["minutes"] * lock["machine"]["threads"] <= 2 * 45, "45 minutes on two cores"


def test_it_moves_entities_of_new_scenes_nearer_to_their_paths(pipe: Any) -> None:
    samples = [World(24, 31).sample(index) for index in range(24)]
    found = outcome(samples, videos(pipe, samples, steps=10, seed=1, batch=12))
    free = outcome(samples, videos(pipe.base(), samples, steps=10, seed=1, batch=12))
    assert np.mean(found.objmc) < 0.85 * np.mean(free.objmc)


def leak(frames: np.ndarray, maps: np.ndarray) -> float:
    """Correlation between what departs from a frame's mean and the Gaussian maps."""
    grey = frames.mean(-1)
    return float(np.corrcoef((grey - grey.mean((1, 2), keepdims=True)).ravel(), maps.ravel())[0, 1])


def plain_videos(pipe: Any, scale: float = 1.0) -> tuple[list[np.ndarray], np.ndarray]:
    """Videos of first frames in one colour, and the Gaussian maps that they were made with."""
    mask = np.zeros((SIDE, SIDE), bool)
    mask[8:15, 5:12] = True
    scene = Scene(SIDE, SIDE, FRAMES, (Entity(mask, [(0, 0), (7, 2)]),))
    made = [
        pipe(
            Image.new("RGB", (SIDE, SIDE), colour), scene, SIDE, SIDE, num_inference_steps=10, output_type="np",
            max_guidance_scale=1.0, generator=torch.Generator().manual_seed(0), controlnet_conditioning_scale=scale,
        ).frames[0]
        for colour in ((110, 130, 120), (90, 90, 150), (150, 120, 100))
    ]  # fmt: skip
    return made, gaussian_maps(Tracks.of(scene), range(FRAMES))[:, 0].numpy()


def test_maps_that_are_added_to_a_video_are_seen(pipe: Any) -> None:
    made, maps = plain_videos(pipe)
    assert min(leak(each + 0.2 * maps[..., None] / 255, maps) for each in made) > 0.3


@pytest.mark.xfail(reason="0.20, of which 0.15 are there without control, too (docs/draganything.md)")
def test_control_maps_do_not_show_in_the_video(pipe: Any) -> None:
    made, maps = plain_videos(pipe)
    assert abs(np.mean([leak(each, maps) for each in made])) < 0.1


def test_control_adds_little_to_what_a_video_without_it_has_of_its_maps(pipe: Any) -> None:
    (made, maps), (free, _) = plain_videos(pipe), plain_videos(pipe, 0.0)

    def added(videos: list[np.ndarray]) -> float:
        return float(np.mean([leak(own, maps) - leak(none, maps) for own, none in zip(videos, free, strict=True)]))

    assert added(made) < 0.1 < 0.2 < added([each + 0.2 * maps[..., None] / 255 for each in made])

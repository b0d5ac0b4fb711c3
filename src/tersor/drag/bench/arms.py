"""What a control map may hold, trained and asked alike: the paper's ablation, and a point as DragNUWA is told it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tersor.drag.bench.world import Sample
from tersor.drag.features import VaeFeatures
from tersor.drag.loading import new_branch
from tersor.drag.maps import Tracks
from tersor.drag.pipeline import DragAnythingPipeline

#: Radius in pixels of a point's Gaussian, whatever it belongs to.
POINT = 3


class EntityOnly(DragAnythingPipeline):
    """Without Gaussian maps."""

    def control_maps(self, tracks: Tracks, vectors: Tensor, frames: range, map_mode: str) -> tuple[Tensor, Tensor]:
        """See `DragAnythingPipeline.control_maps`."""
        near, what = super().control_maps(tracks, vectors, frames, map_mode)
        return torch.zeros_like(near), what


class GaussianOnly(DragAnythingPipeline):
    """Without entity maps."""

    def control_maps(self, tracks: Tracks, vectors: Tensor, frames: range, map_mode: str) -> tuple[Tensor, Tensor]:
        """See `DragAnythingPipeline.control_maps`."""
        near, what = super().control_maps(tracks, vectors, frames, map_mode)
        return near, torch.zeros_like(what)


class PointOnly(GaussianOnly):
    """With Gaussians of one small size: where something goes, and not what (arXiv 2308.08089)."""

    def control_maps(self, tracks: Tracks, vectors: Tensor, frames: range, map_mode: str) -> tuple[Tensor, Tensor]:
        """See `DragAnythingPipeline.control_maps`."""
        return super().control_maps(replace(tracks, radii=(POINT,) * len(tracks.radii)), vectors, frames, map_mode)


#: Arm -> its pipeline.
ARMS: dict[str, type[DragAnythingPipeline]] = {
    "entity + Gaussian": DragAnythingPipeline,
    "entity only": EntityOnly,
    "Gaussian only": GaussianOnly,
    "point only": PointOnly,
}


def new_arm(svd: Any, arm: str, *, name: str, seed: int) -> DragAnythingPipeline:
    """An arm's pipeline with a branch that changes nothing yet.

    Args:
        svd: A pipeline of the world's size; its parts are shared.
        arm: One of `ARMS`.
        name: What its autoencoder is known by, see `VaeFeatures`.
        seed: Of what is drawn in the branch.
    """
    torch.manual_seed(seed)
    features = VaeFeatures(svd.vae, name)
    pipe = ARMS[arm](**svd.components, controlnet=new_branch(svd, features), entity_feature_extractor=features)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def videos(pipe: Any, samples: Sequence[Sample], *, steps: int, seed: int, batch: int = 20) -> list[np.ndarray]:
    """A video of each sample, float ``[frames, side, side, 3]`` from 0 to 1.

    Args:
        pipe: An arm's, or a stock SVD pipeline, which is told nothing of the entities.
        samples: Their first frames and paths are taken.
        steps: Denoising steps.
        seed: Of the noise, which is another one for each sample.
        batch: Samples at once.
    """
    found: list[np.ndarray] = []
    for first in range(0, len(samples), batch):
        part = samples[first : first + batch]
        pictures = [Image.fromarray(each.clip.frames[0]) for each in part]
        frames, height, width = part[0].clip.masks.shape
        scenes = [each.clip.scene() for each in part]
        controlled = {"entities": scenes} if isinstance(pipe, DragAnythingPipeline) else {}
        made = pipe(
            pictures, **controlled, height=height, width=width, num_frames=frames, num_inference_steps=steps,
            max_guidance_scale=1.0, output_type="np",
            generator=[torch.Generator().manual_seed(seed * 100_003 + first + place) for place in range(len(part))],
        )  # fmt: skip
        found += [*made.frames]
    return found

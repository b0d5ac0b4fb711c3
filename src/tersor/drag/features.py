"""Entity features: what a vision model sees under a mask of the first frame, one vector an entity (section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor._errors import TersorError
from tersor.drag.scene import Scene


class EntityFeatureExtractor(Protocol):
    """Makes of a picture a map of features."""

    @property
    def record(self) -> dict[str, Any]:
        """What it is, as JSON takes it: a control branch keeps it, and takes features of no other."""

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Features ``[channels, rows, columns]`` of an image ``[3, height, width]`` from 0 to 1."""


def entity_features(features: Tensor, scene: Scene) -> Tensor:
    """Mean of the features under each mask, ``[entities, channels]``.

    A cell counts by how much of it the mask covers, so that the smallest mask has features, too.

    Args:
        features: ``[channels, rows, columns]`` of the first frame.
        scene: Its masks.
    """
    masks = torch.stack([torch.from_numpy(each.mask) for each in scene.entities]).to(features.device, features.dtype)
    shares = F.interpolate(masks[:, None], features.shape[1:], mode="area")[:, 0].flatten(1)
    return shares @ features.flatten(1).T / shares.sum(1, keepdim=True)


def check_record(known: dict[str, Any] | None, given: dict[str, Any]) -> None:
    """Raise `TersorError` unless a control branch takes the features of an extractor.

    Args:
        known: What the branch was trained with; None where nobody knows.
        given: `EntityFeatureExtractor.record`.
    """
    if known is None:
        return
    for name in sorted({*known, *given}):
        if known.get(name) != given.get(name):
            raise TersorError(
                f"the control branch was trained on features with {name}={known.get(name)!r}, and these have "
                f"{given.get(name)!r}; give the extractor that it was trained with"
            )


@dataclass(frozen=True)
class DiffusionFeatures:
    """Features of a text-to-image UNet on a noised picture, as in DIFT (arXiv 2306.03881) and the paper.

    Args:
        pipe: A Stable Diffusion pipeline: ``vae``, ``unet``, ``text_encoder``, ``tokenizer`` and ``scheduler``.
        name: Of the checkpoint, for `record`.
        up_block_index: The up block whose output is taken.
        timestep: How much noise there is.
        ensemble_size: Draws of noise that are averaged.
        prompt: What the UNet is told.
        size: Height and width that the picture is resized to; None leaves it.
    """

    pipe: Any
    name: str
    up_block_index: int = 3
    timestep: int = 261
    ensemble_size: int = 8
    prompt: str = ""
    size: tuple[int, int] | None = None

    @property
    def record(self) -> dict[str, Any]:
        """See `EntityFeatureExtractor`."""
        told = ("name", "up_block_index", "timestep", "ensemble_size", "prompt")
        channels = int(self._block().resnets[-1].out_channels)
        return {"kind": "diffusion", **{each: getattr(self, each) for each in told}, "channels": channels}

    def _block(self) -> Any:
        blocks = self.pipe.unet.up_blocks
        if not 0 <= self.up_block_index < len(blocks):
            raise TersorError(f"up_block_index={self.up_block_index} must be from 0 to {len(blocks) - 1}")
        return blocks[self.up_block_index]

    @torch.no_grad()
    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See `EntityFeatureExtractor`."""
        pipe, unet = self.pipe, self.pipe.unet
        given = image[None].to(pipe.vae.device, pipe.vae.dtype)
        if self.size is not None:
            given = F.interpolate(given, self.size, mode="bilinear", antialias=True)
        law = pipe.vae.encode(2 * given.expand(self.ensemble_size, -1, -1, -1) - 1).latent_dist
        latents = law.sample(generator) * pipe.vae.config.scaling_factor
        steps = torch.full((len(latents),), self.timestep, device=latents.device)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        noised = pipe.scheduler.add_noise(latents, noise, steps).to(unet.dtype)
        tokens = pipe.tokenizer(
            self.prompt, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        told = pipe.text_encoder(tokens.to(pipe.text_encoder.device))[0].to(unet.dtype).expand(len(noised), -1, -1)
        kept: list[Tensor] = []
        hook = self._block().register_forward_hook(lambda block, args, out: kept.append(out))
        try:
            unet(noised, steps, encoder_hidden_states=told)
        finally:
            hook.remove()
        return kept[0].float().mean(0)


@dataclass(frozen=True)
class DinoFeatures:
    """Patch features of a vision transformer, such as DINOv2.

    Args:
        model: Of transformers, whose ``last_hidden_state`` has the patches last.
        name: Of the checkpoint, for `record`.
        mean: That pictures are centred with.
        std: That they are divided by.
    """

    model: Any
    name: str
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)

    @property
    def record(self) -> dict[str, Any]:
        """See `EntityFeatureExtractor`."""
        return {"kind": "dino", "name": self.name, "channels": int(self.model.config.hidden_size)}

    @torch.no_grad()
    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See `EntityFeatureExtractor`; the picture is resized so that patches divide it."""
        patch = self.model.config.patch_size
        rows, columns = (max(1, round(side / patch)) for side in image.shape[1:])
        given = F.interpolate(image[None], (rows * patch, columns * patch), mode="bilinear", antialias=True)
        mean, std = (given.new_tensor([*each])[:, None, None] for each in (self.mean, self.std))
        parameter = next(self.model.parameters())
        said = self.model(((given - mean) / std).to(parameter.device, parameter.dtype)).last_hidden_state
        found: Tensor = said[0, -rows * columns :].float().T.reshape(-1, rows, columns)
        return found


@dataclass(frozen=True)
class VaeFeatures:
    """The latents of the video model's own VAE: no further model, and little meaning.

    Args:
        vae: With ``encode`` and ``config.scaling_factor``.
        name: Of the checkpoint, for `record`.
    """

    vae: Any
    name: str

    @property
    def record(self) -> dict[str, Any]:
        """See `EntityFeatureExtractor`."""
        return {"kind": "vae", "name": self.name, "channels": int(self.vae.config.latent_channels)}

    @torch.no_grad()
    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See `EntityFeatureExtractor`."""
        law = self.vae.encode(2 * image[None].to(self.vae.device, self.vae.dtype) - 1).latent_dist
        latents: Tensor = law.mode()[0].float() * self.vae.config.scaling_factor
        return latents

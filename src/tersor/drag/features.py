"""Entity features: what a vision model sees under a mask of the first frame, one vector an entity (section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tersor._errors import TersorError
from tersor.drag.scene import Scene

#: Side of the picture of `seen`, how many channels of it are kept, and how far apart those of one checkpoint may be:
#: half precision and another device change little, other weights change everything.
_SIDE, _KEPT, _SAME = 64, 16, 0.05


class EntityFeatureExtractor(Protocol):
    """Makes of a picture a map of features."""

    @property
    def record(self) -> dict[str, Any]:
        """What it is, as JSON takes it, with its ``channels``: a control branch keeps it and takes no other's features.

        The checkpoint's name stands in it for people; `seen` is what tells checkpoints apart.
        """

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


def seen(extractor: EntityFeatureExtractor) -> list[float]:
    """Mean features of a picture that is always the same, the first channels of them.

    They tell one checkpoint from another, wherever it lies and in whatever precision it runs.
    """
    ramp = torch.linspace(0.0, 1.0, _SIDE)
    across, down = ramp.expand(_SIDE, -1), ramp[:, None].expand(-1, _SIDE)
    found = extractor(torch.stack([across, down, 1 - across]), torch.Generator().manual_seed(0))
    return [round(value, 4) for value in found.float().mean((1, 2))[:_KEPT].tolist()]


def check_record(known: dict[str, Any] | None, given: dict[str, Any]) -> None:
    """Raise `TersorError` unless a control branch takes the features of an extractor.

    Args:
        known: What the branch was trained with; None where nobody knows.
        given: `EntityFeatureExtractor.record`.
    """
    if known is None:
        return
    for name in sorted({*known, *given} - {"name", "seen"}):
        if known.get(name) != given.get(name):
            raise TersorError(
                f"the control branch was trained on features with {name}={known.get(name)!r}, and these have "
                f"{given.get(name)!r}; give the extractor that it was trained with"
            )
    one, other = torch.tensor(known["seen"]), torch.tensor(given["seen"])
    if (one - other).norm() > _SAME * one.norm():
        raise TersorError(
            f"the control branch was trained on the features of {known['name']}, and those of {given['name']} are "
            "others; give the checkpoint that it was trained with"
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

    @cached_property
    def record(self) -> dict[str, Any]:
        """See `EntityFeatureExtractor`."""
        told = ("name", "up_block_index", "timestep", "ensemble_size", "prompt")
        channels = int(self._block().resnets[-1].out_channels)
        facts = {"kind": "diffusion", **{each: getattr(self, each) for each in told}, "channels": channels}
        return {**facts, "seen": seen(self)}

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
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
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

    @cached_property
    def record(self) -> dict[str, Any]:
        """See `EntityFeatureExtractor`."""
        channels = int(self.model.config.hidden_size)
        return {"kind": "dino", "name": self.name, "channels": channels, "seen": seen(self)}

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

    @cached_property
    def record(self) -> dict[str, Any]:
        """See `EntityFeatureExtractor`."""
        channels = int(self.vae.config.latent_channels)
        return {"kind": "vae", "name": self.name, "channels": channels, "seen": seen(self)}

    @torch.no_grad()
    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See `EntityFeatureExtractor`."""
        law = self.vae.encode(2 * image[None].to(self.vae.device, self.vae.dtype) - 1).latent_dist
        latents: Tensor = law.mode()[0].float() * self.vae.config.scaling_factor
        return latents

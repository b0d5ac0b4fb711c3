"""The training objective of Stable Video Diffusion (EDM, arXiv 2206.00364), and the paper's masked loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor._errors import TersorError

#: What the loss is over: what the entities cover, whatever their size; the same as a share of the whole; everything.
LOSS_MASKS = ("area", "mean", "none")


@dataclass(frozen=True)
class Scalings:
    """EDM's factors for Stable Video Diffusion, whose data has unit variance and whose UNet predicts v (Table 1).

    Args:
        sigma: Standard deviation of the noise, of any shape.
    """

    sigma: Tensor

    @property
    def c_in(self) -> Tensor:
        """Of the noisy latents before the UNet."""
        return 1 / (self.sigma**2 + 1).sqrt()

    @property
    def c_skip(self) -> Tensor:
        """Of the noisy latents in the prediction."""
        return 1 / (self.sigma**2 + 1)

    @property
    def c_out(self) -> Tensor:
        """Of the UNet's output in the prediction."""
        return -self.sigma / (self.sigma**2 + 1).sqrt()

    @property
    def timestep(self) -> Tensor:
        """What the UNet is told of the noise."""
        return 0.25 * self.sigma.log()

    @property
    def weight(self) -> Tensor:
        """Of the squared error."""
        return (1 + self.sigma**2) / self.sigma**2


@dataclass(frozen=True)
class Noised:
    """Latents with noise: what the UNet is shown of them, and what its output says that they are.

    Args:
        noisy: ``[batch, frames, channels, rows, columns]``.
        seen: Those, scaled, with the first frame's latents beside them in channels.
        known: Of the noise, for ``noisy``.
    """

    noisy: Tensor
    seen: Tensor
    known: Scalings

    @classmethod
    def of(cls, latents: Tensor, first: Tensor, sigmas: Tensor, noise: Tensor) -> Noised:
        """Add noise.

        Args:
            latents: ``[batch, frames, channels, rows, columns]``.
            first: Latents of the first frame, ``[batch, channels, rows, columns]``.
            sigmas: Standard deviations, ``[batch]``.
            noise: Normal, as ``latents``.
        """
        known = Scalings(sigmas.view(-1, 1, 1, 1, 1))
        noisy = latents + known.sigma * noise.to(latents)
        return cls(noisy, torch.cat([known.c_in * noisy, first[:, None].expand_as(latents)], dim=2), known)

    def predicted(self, out: Tensor) -> Tensor:
        """The latents that the UNet's output stands for."""
        return self.known.c_out * out.float() + self.known.c_skip * self.noisy


def draw_sigmas(count: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """Standard deviations of the noise whose logarithms are normal, ``[count]``."""
    return (mean + std * torch.randn(count, generator=generator)).exp()


def latent_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Which latents any entity covers a part of, ``[..., rows, columns]``, of masks ``[..., height, width]``."""
    flat = masks.flatten(0, -3).float()[:, None]
    return (F.interpolate(flat, size, mode="area") > 0).float().view(*masks.shape[:-2], *size)


def masked_loss(predicted: Tensor, latents: Tensor, weight: Tensor, masks: Tensor, kind: str = "area") -> Tensor:
    """The weighted squared error where the entities are (paper, equation 3), a scalar.

    Args:
        predicted: Denoised latents ``[batch, frames, channels, rows, columns]``.
        latents: What they should be.
        weight: `Scalings.weight` of each sample, ``[batch]``.
        masks: `latent_masks` of what the entities cover, ``[batch, frames, rows, columns]``.
        kind: One of `LOSS_MASKS`.
    """
    if kind not in LOSS_MASKS:
        raise TersorError(f"loss_mask={kind!r} must be one of {LOSS_MASKS}")
    errors = (predicted.float() - latents.float()).square().mean(2)
    if kind == "none":
        each = errors.mean((1, 2, 3))
    elif kind == "mean":
        each = (errors * masks).mean((1, 2, 3))
    else:
        each = (errors * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3)).clamp(min=1)
    return (weight * each).mean()

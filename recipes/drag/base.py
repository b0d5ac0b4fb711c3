"""The base of tiny-drag: a Stable Video Diffusion pipeline of the real classes, trained without any control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from PIL import Image
from shared.run import Progress, Run, set_rate
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tersor.bench.measure import seed_of
from tersor.drag.bench.world import FRAMES, SIDE
from tersor.drag.data import Clip
from tersor.drag.objective import Noised, Scalings, draw_sigmas

#: Weight of the distance between the codes' distribution and the normal one.
_DIVERGENCE = 1e-6
#: Channels of latents: a block of 2 x 2 pixels in colours does not fit into SVD's four.
LATENTS = 8
#: Clips of an update of the autoencoder, and frames of each.
_VAE_CLIPS, _VAE_FRAMES = 4, 3
#: Standard deviation of the noise on the first frame, as in SVD.
NOISE = 0.02


@dataclass(frozen=True)
class BasePlan:
    """How long the parts of the base are trained.

    Args:
        vae_steps: Updates of the autoencoder.
        unet_steps: Updates of the UNet.
        batch_size: Clips of an update.
        clips: Different clips.
        vae_rate: Highest learning rate of the autoencoder.
        unet_rate: Of the UNet.
    """

    vae_steps: int = 1400
    unet_steps: int = 1700
    batch_size: int = 8
    clips: int = 4000
    vae_rate: float = 1.5e-3
    unet_rate: float = 1.5e-3


#: The UNet's second round, with clips of one colour among the others.
SECOND = BasePlan(vae_steps=0, unet_steps=1000, unet_rate=1e-3)


def new_pipeline(seed: int) -> StableVideoDiffusionPipeline:
    """The pipeline before any training; its image encoder stays as it is drawn here."""
    torch.manual_seed(seed)
    vae = AutoencoderKLTemporalDecoder(
        # Norms have 32 groups: with two channels in each, they leave what a picture's mean is.
        block_out_channels=(64, 64), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        latent_channels=LATENTS, sample_size=SIDE, force_upcast=False,
    )  # fmt: skip
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(64, 64), layers_per_block=1, sample_size=SIDE // 2, in_channels=2 * LATENTS,
        out_channels=LATENTS,
        down_block_types=("DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
        up_block_types=("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"), cross_attention_dim=32,
        num_attention_heads=(2, 4), projection_class_embeddings_input_dim=96, addition_time_embed_dim=32,
        num_frames=FRAMES,
    )  # fmt: skip
    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32, projection_dim=32, num_hidden_layers=1, num_attention_heads=4, image_size=224,
            intermediate_size=64, patch_size=56,
        )
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", interpolation_type="linear",
        num_train_timesteps=1000, prediction_type="v_prediction", sigma_max=80.0, sigma_min=0.002, steps_offset=1,
        timestep_spacing="leading", timestep_type="continuous", use_karras_sigmas=True,
    )  # fmt: skip
    pipe = StableVideoDiffusionPipeline(vae, clip, unet, scheduler, CLIPImageProcessorPil(crop_size=224, size=224))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def train_vae(
    pipe: StableVideoDiffusionPipeline, clips: Sequence[Clip], plan: BasePlan, seed: int, state: Path
) -> Progress:
    """Train the autoencoder to give clips back, and set its scale so that latents have unit variance."""
    vae = pipe.vae

    def loss(step: int, generator: torch.Generator) -> Tensor:
        pixels = _pixels(clips, torch.randint(len(clips), (_VAE_CLIPS,), generator=generator))
        begin = step % (FRAMES - _VAE_FRAMES + 1)
        pixels = pixels[:, begin : begin + _VAE_FRAMES].flatten(0, 1)
        law = vae.encode(pixels).latent_dist
        seen = vae.decode(law.sample(generator), num_frames=_VAE_FRAMES).sample
        return F.l1_loss(seen, pixels) + 4 * F.mse_loss(seen, pixels) + _DIVERGENCE * law.kl().mean()

    progress = _train("vae", vae, loss, plan.vae_steps, plan.vae_rate, plan, seed, state)
    with torch.no_grad():
        latents = vae.encode(_pixels(clips, torch.arange(min(64, len(clips)))).flatten(0, 1)).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return progress


def _train(
    name: str, model: Any, loss: Callable[[int, torch.Generator], Tensor], steps: int, rate: float, plan: BasePlan,
    seed: int, state: Path,
) -> Progress:  # fmt: skip
    """Make the loss of a part smaller; its curve has the mean of every hundred updates."""
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    run, losses = Run(state, plan, seed, model, optimizer, Progress()), list[float]()

    def update() -> float:
        step = run.progress.step
        found = loss(step, torch.Generator().manual_seed(seed_of(seed, step)))
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return found.item()

    while run.progress.step < steps:
        set_rate(optimizer, rate * _share(run.progress.step, steps))
        losses.append(run.advance(update))
        if run.progress.step % 100 == 0:
            run.note({name: run.progress.step, "loss": round(sum(losses) / len(losses), 4)})
            losses = []
        run.save(now=run.progress.step == steps)
    return run.progress


@torch.no_grad()
def scored(pipe: StableVideoDiffusionPipeline, clips: Sequence[Clip]) -> dict[str, float]:
    """How well the autoencoder gives clips back."""
    pixels = _pixels(clips, torch.arange(len(clips))).flatten(0, 1)
    seen = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode(), num_frames=FRAMES).sample.clamp(-1, 1)
    error = ((seen - pixels) / 2).square().mean()
    return {"frames": len(pixels), "psnr": round(-10 * error.log10().item(), 2)}


@torch.no_grad()
def encoded(pipe: StableVideoDiffusionPipeline, clips: Sequence[Clip]) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of all frames, those of the first as SVD is told them, and what the image encoder says of it."""
    latents, first, told = [], [], []
    for rows in torch.arange(len(clips)).split(32):
        pixels = _pixels(clips, rows)
        codes = pipe.vae.encode(pixels.flatten(0, 1)).latent_dist.mode() * pipe.vae.config.scaling_factor
        noise = NOISE * torch.randn(pixels[:, 0].shape, generator=torch.Generator().manual_seed(int(rows[0])))
        latents.append(codes.unflatten(0, pixels.shape[:2]))
        first.append(pipe.vae.encode(pixels[:, 0] + noise).latent_dist.mode())
        shown = [Image.fromarray(clips[row].frames[0]) for row in rows.tolist()]
        told.append(pipe._encode_image(shown, "cpu", 1, False))
    return torch.cat(latents), torch.cat(first), torch.cat(told)


def train_unet(
    pipe: StableVideoDiffusionPipeline, clips: Sequence[Clip], plan: BasePlan, seed: int, state: Path
) -> Progress:
    """Train the UNet to take noise away, knowing the first frame."""
    latents, first, told = encoded(pipe, clips)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(clips), (plan.batch_size,), generator=generator)
        sigmas = draw_sigmas(len(rows), 0.0, 1.6, generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        noised = Noised.of(latents[rows], first[rows], sigmas, noise)
        ids = torch.tensor([[6, 128, NOISE]] * len(rows))
        out = pipe.unet(noised.seen, Scalings(sigmas).timestep, told[rows], ids, return_dict=False)[0]
        return (noised.known.weight * (noised.predicted(out) - latents[rows]) ** 2).mean()

    return _train("unet", pipe.unet, loss, plan.unet_steps, plan.unet_rate, plan, seed, state)


def _pixels(clips: Sequence[Clip], rows: Tensor) -> Tensor:
    """Frames from -1 to 1, ``[rows, frames, 3, side, side]``."""
    frames = torch.stack([torch.from_numpy(clips[row].frames) for row in rows.tolist()])
    return frames.permute(0, 1, 4, 2, 3).float() / 127.5 - 1


def _share(step: int, steps: int) -> float:
    """Share of the learning rate: rises for 50 steps, then falls."""
    return min((step + 1) / 50, 1.25 * (steps - step) / steps, 1.0)

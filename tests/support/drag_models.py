"""A tiny real SVD pipeline, a branch for it, and scenes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tersor.drag.controlnet import SpatioTemporalControlNetModel
from tersor.drag.scene import Entity

FRAMES, SIDE = 3, 32


def unet() -> UNetSpatioTemporalConditionModel:
    torch.manual_seed(0)
    return UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), layers_per_block=2, sample_size=32, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=32,
        num_attention_heads=8, projection_class_embeddings_input_dim=96, addition_time_embed_dim=32,
    ).eval()  # fmt: skip


def branch(of: UNetSpatioTemporalConditionModel, *, seed: int | None = None, **changes: Any) -> Any:
    """As `from_unet` makes it; with a seed its zero convolutions are not zero."""
    settings = {"conditioning_embedding_out_channels": (4, 8), "entity_embedding_out_channels": (6, 8), **changes}
    made = SpatioTemporalControlNetModel.from_unet(of, **settings).eval()
    if seed is not None:
        torch.manual_seed(seed)
        embedding = made.controlnet_cond_embedding
        outs = [embedding.conv_out, *made.controlnet_down_blocks, made.controlnet_mid_block]
        for each in [*outs, *([embedding.conv_out_feature] if hasattr(embedding, "conv_out_feature") else [])]:
            torch.nn.init.normal_(each.weight, std=0.05)
    return made


def svd() -> StableVideoDiffusionPipeline:
    own = unet()
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=[32, 64], in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 2,
        latent_channels=4,
    ).eval()  # fmt: skip
    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32, projection_dim=32, num_hidden_layers=2, num_attention_heads=4, image_size=224,
            intermediate_size=37, patch_size=56,
        )
    ).eval()  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", interpolation_type="linear",
        num_train_timesteps=1000, prediction_type="v_prediction", sigma_max=700.0, sigma_min=0.002, steps_offset=1,
        timestep_spacing="leading", timestep_type="continuous", use_karras_sigmas=True,
    )  # fmt: skip
    extractor = CLIPImageProcessorPil(crop_size=224, size=224)
    pipe = StableVideoDiffusionPipeline(vae, clip, own, scheduler, extractor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))


def square(row: int, column: int, size: int, *, side: int = SIDE) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[row : row + size, column : column + size] = True
    return mask


def entities(count: int = 2) -> list[Entity]:
    return [
        Entity(square(2 + 14 * number, 4, 9), [(8, 6 + 14 * number), (20, 8 + 12 * number)], f"box {number}")
        for number in range(count)
    ]


def features(count: int = 2, channels: int = 12) -> torch.Tensor:
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(1))

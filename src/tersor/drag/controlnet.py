"""The control branch: a copy of SVD's encoder with two condition encoders and zero convolutions (section 3.4).

Parameters are named as in the authors' checkpoint, whose facts were read from its file; the code is written anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, UNetSpatioTemporalConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_3d_blocks import UNetMidBlockSpatioTemporal, get_down_block
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from tersor._errors import TersorError
from tersor.drag.maps import MOST_RADIUS

#: Class of the authors' branch in its ``config.json``.
OFFICIAL_CLASS = "DragAnythingSDVModel"
#: What a branch copies from the UNet that it belongs to.
COPIED = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block")


@dataclass
class SpatioTemporalControlNetOutput(BaseOutput):  # type: ignore[misc]
    """What the branch adds to the UNet.

    Args:
        down_block_res_samples: For each skip of the encoder, ``[batch * frames, channels, rows, columns]``.
        mid_block_res_sample: For the middle.
    """

    down_block_res_samples: tuple[Tensor, ...]
    mid_block_res_sample: Tensor


def zeroed(module: nn.Module) -> nn.Module:
    """A module whose parameters are zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def encoder_stages(channels: Sequence[int]) -> nn.ModuleList:
    """Convolutions in pairs, the second of which halves the sides and has the next number of channels."""
    stages: list[nn.Module] = []
    for own, following in pairwise(channels):
        stages += [nn.Conv2d(own, own, 3, padding=1), nn.Conv2d(own, following, 3, stride=2, padding=1)]
    return nn.ModuleList(stages)


class ConditionEmbedding(nn.Module):
    """From the two maps to what is added to the branch's first features.

    Args:
        out_channels: Of the branch's first features.
        conditioning_channels: Of the Gaussian map.
        widths: Channels of the stages for the Gaussian map.
        entity_widths: Channels of the stages for the entity map, the first of which is the map's own; empty for a
            branch that has one map.
    """

    def __init__(
        self, out_channels: int, conditioning_channels: int, widths: Sequence[int], entity_widths: Sequence[int]
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(conditioning_channels, widths[0], 3, padding=1)
        self.blocks = encoder_stages(widths)
        self.conv_out = zeroed(nn.Conv2d(widths[-1], out_channels, 3, padding=1))
        if entity_widths:
            self.blocks_feature = encoder_stages(entity_widths)
            self.conv_out_feature = zeroed(nn.Conv2d(entity_widths[-1], out_channels, 3, padding=1))

    def forward(self, conditioning: Tensor, entities: Tensor | None) -> Tensor:
        """Of maps ``[frames, channels, height, width]``: ``[frames, out_channels, rows, columns]``."""
        hidden = F.silu(self.conv_in(conditioning))
        for stage in self.blocks:
            hidden = F.silu(stage(hidden))
        found: Tensor = self.conv_out(hidden)
        if entities is None:
            return found
        for stage in self.blocks_feature:
            entities = F.silu(stage(entities))
        features: Tensor = self.conv_out_feature(entities)
        return found + features


def accumulated(resnets_per_block: Sequence[int]) -> tuple[float, ...]:
    """How often the authors' UNet adds each residual: those of block b of N come N - b times, the stem's N times.

    Args:
        resnets_per_block: Resnets of each down block; all blocks but the last have a downsampler, too.
    """
    blocks = len(resnets_per_block)
    found = [float(blocks)]
    for block, resnets in enumerate(resnets_per_block):
        found += [float(blocks - block)] * (resnets + (block < blocks - 1))
    return tuple(found)


class SpatioTemporalControlNetModel(
    ModelMixin,  # type: ignore[misc]
    AttentionMixin,  # type: ignore[misc]
    ConfigMixin,  # type: ignore[misc]
    FromOriginalModelMixin,  # type: ignore[misc]
    PeftAdapterMixin,  # type: ignore[misc]
):
    """DragAnything's branch for SVD; `from_unet` makes one that changes nothing yet.

    Args:
        sample_size: Of latents; not used, kept as SVD's UNet has it.
        in_channels: Of noisy and first-frame latents together.
        down_block_types: As of the UNet.
        block_out_channels: As of the UNet.
        addition_time_embed_dim: As of the UNet.
        projection_class_embeddings_input_dim: As of the UNet.
        layers_per_block: As of the UNet.
        cross_attention_dim: As of the UNet.
        transformer_layers_per_block: As of the UNet.
        num_attention_heads: As of the UNet.
        num_frames: That it was trained with.
        conditioning_channels: Of the Gaussian map.
        conditioning_embedding_out_channels: Stages of its encoder; each but the first halves the sides.
        entity_embedding_out_channels: Stages of the entity map's encoder, the first of which is the map's channels;
            empty for a branch of one map, such as depth.
        residual_multipliers: A factor for each skip, 1 where None: the authors' UNet adds most residuals several times.
        entity_features: What features it was trained on, see `tersor.drag.features`; None where nobody knows.
        map_mode: How the Gaussian maps were drawn that it was trained on, see `tersor.drag.maps`.
        max_radius: Largest radius of an entity that it is meant for, in pixels of a picture with 320 rows; None is any.

    Raises:
        TersorError: If parts do not fit together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock", "ConditionEmbedding"]  # noqa: RUF012

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 8,
        down_block_types: Sequence[str] = (
            "CrossAttnDownBlockSpatioTemporal",
            "CrossAttnDownBlockSpatioTemporal",
            "CrossAttnDownBlockSpatioTemporal",
            "DownBlockSpatioTemporal",
        ),
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        addition_time_embed_dim: int = 256,
        projection_class_embeddings_input_dim: int = 768,
        layers_per_block: int | Sequence[int] = 2,
        cross_attention_dim: int | Sequence[int] = 1024,
        transformer_layers_per_block: int | Sequence[int] = 1,
        num_attention_heads: int | Sequence[int] = (5, 10, 20, 20),
        num_frames: int = 25,
        conditioning_channels: int = 3,
        conditioning_embedding_out_channels: Sequence[int] = (16, 32, 96, 256),
        entity_embedding_out_channels: Sequence[int] = (160, 160, 256, 256),
        residual_multipliers: Sequence[float] | None = None,
        entity_features: dict[str, Any] | None = None,
        map_mode: str = "exact",
        max_radius: float | None = None,
    ) -> None:
        super().__init__()
        blocks = len(down_block_types)
        if entity_embedding_out_channels and len(entity_embedding_out_channels) != len(
            conditioning_embedding_out_channels
        ):
            raise TersorError("both condition encoders must halve as often: give as many stages to each")
        layers, cross, transformers, heads = (
            [value] * blocks if isinstance(value, int) else [*value]
            for value in (layers_per_block, cross_attention_dim, transformer_layers_per_block, num_attention_heads)
        )
        first, width = block_out_channels[0], 4 * block_out_channels[0]
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.time_proj = Timesteps(first, True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, width)
        self.add_time_proj = Timesteps(addition_time_embed_dim, True, downscale_freq_shift=0)
        self.add_embedding = TimestepEmbedding(projection_class_embeddings_input_dim, width)
        self.controlnet_cond_embedding = ConditionEmbedding(
            first, conditioning_channels, conditioning_embedding_out_channels, entity_embedding_out_channels
        )
        self.down_blocks = nn.ModuleList(
            get_down_block(
                kind, num_layers=layers[index], transformer_layers_per_block=transformers[index],
                in_channels=block_out_channels[max(index - 1, 0)], out_channels=block_out_channels[index],
                temb_channels=width, add_downsample=index < blocks - 1, resnet_eps=1e-5,
                cross_attention_dim=cross[index], num_attention_heads=heads[index], resnet_act_fn="silu",
            )
            for index, kind in enumerate(down_block_types)
        )  # fmt: skip
        self.mid_block = UNetMidBlockSpatioTemporal(
            block_out_channels[-1], temb_channels=width, transformer_layers_per_block=transformers[-1],
            cross_attention_dim=cross[-1], num_attention_heads=heads[-1],
        )  # fmt: skip
        skips = [first]
        for index, channels in enumerate(block_out_channels):
            skips += [channels] * (layers[index] + (index < blocks - 1))
        self.controlnet_down_blocks = nn.ModuleList(zeroed(nn.Conv2d(each, each, 1)) for each in skips)
        self.controlnet_mid_block = zeroed(nn.Conv2d(block_out_channels[-1], block_out_channels[-1], 1))
        if residual_multipliers is not None and len(residual_multipliers) != len(skips):
            raise TersorError(f"residual_multipliers has {len(residual_multipliers)} factors for {len(skips)} skips")

    @classmethod
    def from_unet(cls, unet: UNetSpatioTemporalConditionModel, **changes: Any) -> SpatioTemporalControlNetModel:
        """A branch with the encoder of ``unet``, whose zero convolutions leave its videos as they are.

        Args:
            unet: Stays as it is.
            **changes: Arguments of the class that the UNet does not have, such as ``entity_embedding_out_channels``.
        """
        shared = ("sample_size", "in_channels", "down_block_types", "block_out_channels", "addition_time_embed_dim",
                  "projection_class_embeddings_input_dim", "layers_per_block", "cross_attention_dim",
                  "transformer_layers_per_block", "num_attention_heads", "num_frames")  # fmt: skip
        model: SpatioTemporalControlNetModel = cls(**{name: unet.config[name] for name in shared}, **changes)
        for name in COPIED:
            getattr(model, name).load_state_dict(getattr(unet, name).state_dict())
        nn.Module.to(model, unet.dtype)  # diffusers' own warns of parts that stay in float32; there are none
        return model

    @classmethod
    def from_pretrained(cls, location: Any, **options: Any) -> Any:
        """See diffusers. The authors' configuration gets the factors and maps that its weights were trained with."""
        names = ("subfolder", "revision", "cache_dir", "local_files_only", "token")
        known = cls.load_config(location, **{name: options[name] for name in names if name in options})
        if known.get("_class_name") == OFFICIAL_CLASS:
            layers = known.get("layers_per_block", 2)
            blocks = len(known.get("down_block_types", (None,) * 4))
            layers = [layers] * blocks if isinstance(layers, int) else layers
            options = {
                "residual_multipliers": accumulated(layers),
                "map_mode": "official",
                "max_radius": MOST_RADIUS,
                **options,
            }
        return super().from_pretrained(location, **options)

    def encode_condition(self, conditioning: Tensor, entities: Tensor | None = None) -> Tensor:
        """What the maps of some frames add to the first features; it depends on nothing else, so once is enough.

        Args:
            conditioning: Gaussian maps ``[frames, channels, height, width]``.
            entities: Entity maps ``[frames, channels, height, width]``; None for a branch of one map.

        Returns:
            ``[frames, channels, rows, columns]``.

        Raises:
            TersorError: If the maps are not the branch's.
        """
        wanted = [*self.config.entity_embedding_out_channels][:1]
        given = [] if entities is None else [entities.shape[1]]
        if wanted != given or conditioning.shape[1] != self.config.conditioning_channels:
            raise TersorError(
                f"this branch takes maps of {self.config.conditioning_channels} and of {wanted or 'no'} channels; got "
                f"{conditioning.shape[1]} and {given or 'none'}"
            )
        embedding = self.controlnet_cond_embedding
        found: Tensor = embedding(
            conditioning.to(self.device, self.dtype), None if entities is None else entities.to(self.device, self.dtype)
        )
        return found

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        added_time_ids: Tensor,
        controlnet_cond: Tensor | None = None,
        entity_cond: Tensor | None = None,
        cond_embedding: Tensor | None = None,
        conditioning_scale: float = 1.0,
        return_dict: bool = True,
    ) -> SpatioTemporalControlNetOutput | tuple[tuple[Tensor, ...], Tensor]:
        """The residuals of one denoising step.

        Args:
            sample: ``[batch, frames, channels, rows, columns]``.
            timestep: As of the UNet.
            encoder_hidden_states: ``[batch, 1, width]``.
            added_time_ids: ``[batch, 3]``.
            controlnet_cond: Gaussian maps ``[batch, frames, channels, height, width]``.
            entity_cond: Entity maps likewise.
            cond_embedding: Instead of maps, `encode_condition` of them, ``[batch, frames, channels, rows, columns]``.
            conditioning_scale: Factor of all residuals.
            return_dict: Whether to return an output object.
        """
        batch, frames = sample.shape[:2]
        if cond_embedding is None:
            if controlnet_cond is None:
                raise TersorError("give controlnet_cond, or cond_embedding that encode_condition made of it")
            entities = None if entity_cond is None else entity_cond.flatten(0, 1)
            encoded = self.encode_condition(controlnet_cond.flatten(0, 1), entities)
            cond_embedding = encoded.view(batch, frames, *encoded.shape[1:])
        steps = torch.as_tensor(timestep, device=sample.device)
        time = self.time_proj(steps.reshape(-1).expand(batch)).to(sample.dtype)
        ids = self.add_time_proj(added_time_ids.flatten()).reshape(batch, -1).to(sample.dtype)
        emb = (self.time_embedding(time) + self.add_embedding(ids)).repeat_interleave(frames, dim=0)
        told = encoder_hidden_states.repeat_interleave(frames, dim=0)
        hidden = self.conv_in(sample.flatten(0, 1)) + cond_embedding.flatten(0, 1)
        # Whether a frame stands alone: none does.
        shared = {"temb": emb, "image_only_indicator": sample.new_zeros(batch, frames)}
        skips: tuple[Tensor, ...] = (hidden,)
        for block in self.down_blocks:
            crossing = {"encoder_hidden_states": told} if getattr(block, "has_cross_attention", False) else {}
            hidden, found = block(hidden_states=hidden, **crossing, **shared)
            skips += found
        hidden = self.mid_block(hidden_states=hidden, encoder_hidden_states=told, **shared)
        factors = self.config.residual_multipliers or [1.0] * len(skips)
        down = tuple(
            conv(skip) * (factor * conditioning_scale)
            for conv, skip, factor in zip(self.controlnet_down_blocks, skips, factors, strict=True)
        )
        mid = self.controlnet_mid_block(hidden) * conditioning_scale
        return SpatioTemporalControlNetOutput(down, mid) if return_dict else (down, mid)

"""LlamaGen's image tokenizer (arXiv 2406.06525), a convolutional VQ model that runs the published weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tersor._errors import TersorError
from tersor.grids.original import load_strictly, read_weights
from tersor.grids.pixels import check_ids, check_images, divided, to_unit


class VQTokenizerConfig(PreTrainedConfig):
    """Sizes of a `VQTokenizer`; the defaults are VQ-16, which halves the sides four times.

    Args:
        channel_multipliers: Channels of each level over ``base_channels``; between two levels the sides are halved.
        residual_blocks: Blocks of each level of the encoder; the decoder has one more.
        latent_channels: Channels where encoder and decoder meet, before the projection to ``code_width``.
        codebook_size: Number of codes, which are compared as unit vectors.
        code_width: Width of the codes.
        norm_groups: Groups of the group norms; it divides all channels.

    Raises:
        ValueError: If the group norms do not divide the channels.
    """

    model_type = "tersor_vq_tokenizer"

    channel_multipliers: tuple[int, ...] | list[int] = (1, 1, 2, 2, 4)
    base_channels: int = 128
    residual_blocks: int = 2
    latent_channels: int = 256
    codebook_size: int = 16384
    code_width: int = 8
    norm_groups: int = 32

    def __post_init__(self, **kwargs: Any) -> None:
        self.channel_multipliers = tuple(self.channel_multipliers)
        if self.base_channels % self.norm_groups:
            raise TersorError(
                f"base_channels={self.base_channels} must be a multiple of norm_groups={self.norm_groups}"
            )
        super().__post_init__(**kwargs)

    @property
    def channels(self) -> list[int]:
        """Channels by level."""
        return [self.base_channels * each for each in self.channel_multipliers]


class _Residual(nn.Module):
    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return out + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _Attention(nn.Module):
    """One head over all pixels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (each(normed).flatten(2).transpose(1, 2) for each in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """Residual blocks, each followed by attention at the smallest size, and a change of size."""

    def __init__(self, channels: int, out_channels: int, blocks: int, groups: int, *, attends: bool) -> None:
        super().__init__()
        widths = [channels, *[out_channels] * blocks]
        self.res = nn.ModuleList(_Residual(widths[i], widths[i + 1], groups) for i in range(blocks))
        self.attn = nn.ModuleList(_Attention(out_channels, groups) for _ in range(blocks if attends else 0))
        self.resize = ""

    def with_resize(self, name: str, module: nn.Module) -> _Level:
        """Add the change of size under the name that it has in the published weights."""
        self.resize = name
        self.add_module(name, module)
        return self

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
            x = block(x)
            x = self.attn[index](x) if len(self.attn) else x
        return self.get_submodule(self.resize)(x) if self.resize else x


def _middle(channels: int, groups: int) -> nn.ModuleList:
    blocks = [_Residual(channels, channels, groups), _Attention(channels, groups)]
    return nn.ModuleList([*blocks, _Residual(channels, channels, groups)])


class _Encoder(nn.Module):
    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__()
        channels, groups = config.channels, config.norm_groups
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for level, (before, after) in enumerate(zip([config.base_channels, *channels], channels, strict=False)):
            last = level == len(channels) - 1
            block = _Level(before, after, config.residual_blocks, groups, attends=last)
            self.conv_blocks.append(block if last else block.with_resize("downsample", _Downsample(after)))
        self.mid = _middle(channels[-1], groups)
        self.norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class _Decoder(nn.Module):
    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__()
        channels, groups = config.channels[::-1], config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid = _middle(channels[0], groups)
        self.conv_blocks = nn.ModuleList()
        for level, (before, after) in enumerate(zip([channels[0], *channels], channels, strict=False)):
            block = _Level(before, after, config.residual_blocks + 1, groups, attends=level == 0)
            last = level == len(channels) - 1
            self.conv_blocks.append(block if last else block.with_resize("upsample", _Upsample(after)))
        self.norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class _Quantizer(nn.Module):
    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.code_width)

    @property
    def codes(self) -> Tensor:
        return F.normalize(self.embedding.weight, dim=-1)


class VQTokenizer(PreTrainedModel):
    """Colour images to ids and back. Parameters are named as in LlamaGen's checkpoints; `convert_vq` reads those."""

    config_class = VQTokenizerConfig
    main_input_name = "images"

    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__(config)
        self.encoder, self.decoder, self.quantize = _Encoder(config), _Decoder(config), _Quantizer(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_width, 1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_channels, 1)
        self.post_init()

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    def grid_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return divided(image_size, 2 ** (len(self.config.channel_multipliers) - 1))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Ids ``[batch, rows, columns]`` of images ``[batch, 3, height, width]`` from 0 to 1.

        Raises:
            ValueError: If there is another shape, or the grid does not divide the size.
        """
        check_images(images, 3)
        self.grid_size((images.shape[2], images.shape[3]))
        latents = self.quant_conv(self.encoder(2 * images.to(self.dtype) - 1))
        # Codes are unit vectors, so the nearest one is that of the largest product.
        return (F.normalize(latents, dim=1).movedim(1, -1) @ self.quantize.codes.T).argmax(-1)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Images ``[batch, 3, height, width]`` from 0 to 1.

        Args:
            ids: ``[batch, rows, columns]``.

        Raises:
            ValueError: If ids are out of range or of another shape.
        """
        check_ids(ids, self.codebook_size)
        return to_unit(self.decoder(self.post_quant_conv(self.quantize.codes[ids].movedim(-1, 1))))


def convert_vq(path: str | Path, *, norm_groups: int = 32) -> VQTokenizer:
    """A `VQTokenizer` with the weights of an original ``.pt`` file, such as ``vq_ds16_c2i.pt``.

    Args:
        path: The file. It is read without executing anything from it, and mapped rather than loaded.
        norm_groups: See `VQTokenizerConfig`.

    Raises:
        ValueError: If the file holds no such weights; the message lists names or shapes.
    """
    read = read_weights(path, ("model", "state_dict"))
    # How often codes were used in training.
    weights = {name: each for name, each in read.items() if name != "quantize.codebook_used"}
    found = {name: tuple(each.shape) for name, each in weights.items()}
    with torch.device("meta"):
        model = VQTokenizer(_config_of(found, norm_groups, path))
    load_strictly(model, weights, path, "LlamaGen tokenizer")
    return model.eval()


def _config_of(shapes: dict[str, tuple[int, ...]], norm_groups: int, path: str | Path) -> VQTokenizerConfig:
    """Sizes as the weights have them; raises `ValueError` where they do not tell."""
    try:
        base = shapes["encoder.conv_in.weight"][0]
        levels = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.conv_blocks."))
        outs = [shapes[f"encoder.conv_blocks.{level}.res.0.conv1.weight"][0] for level in range(levels)]
        blocks = 1 + max(int(name.split(".")[4]) for name in shapes if name.startswith("encoder.conv_blocks.0.res."))
        codebook_size, code_width = shapes["quantize.embedding.weight"]
        latent = shapes["encoder.conv_out.weight"][0]
    except (KeyError, ValueError, IndexError):
        raise TersorError(f"{path} is no LlamaGen tokenizer: it has {sorted(shapes)[:8]} and so on") from None
    return VQTokenizerConfig(
        channel_multipliers=[each // base for each in outs],
        base_channels=base,
        residual_blocks=blocks,
        latent_channels=latent,
        codebook_size=codebook_size,
        code_width=code_width,
        norm_groups=norm_groups,
    )

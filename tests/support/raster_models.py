"""Tiny raster models with random weights, and tokenizers."""

from __future__ import annotations

from typing import Any

import torch

from tersor.grids.llamagen import LlamaGenConfig
from tersor.grids.vq import VQTokenizer, VQTokenizerConfig

TEXT_CONDITION = {"condition": "text", "condition_tokens": 6}
VQ_SIZES = {"base_channels": 8, "norm_groups": 4, "latent_channels": 12, "codebook_size": 30, "code_width": 4}


def llamagen_config(**changes: Any) -> LlamaGenConfig:
    shape = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_classes": 5,
        "caption_size": 10,
        "grid_size": (3, 4),
        "initializer_range": 0.3,
    }
    return LlamaGenConfig(**{**shape, **changes})


def vq_tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(VQTokenizerConfig(channel_multipliers=(1, 2, 2), **VQ_SIZES)).eval()


def random_images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))

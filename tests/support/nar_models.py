"""Tiny NAR models with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.grids.nar.heads import NARConfig, NARForImageGeneration
from tersor.grids.tokenizer import PatchTokenizer

TEXT = {"condition": "text", "condition_tokens": 7}


def config(grid: tuple[int, ...] = (3, 4), **changes: Any) -> NARConfig:
    shape = {
        "vocab_size": 20,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_classes": 5,
        "caption_size": 10,
        "grid_size": grid,
        # Sharp enough that a wrong position or a wrong key shows.
        "initializer_range": 0.3,
    }
    return NARConfig(**{**shape, **changes})


def model(grid: tuple[int, ...] = (3, 4), seed: int = 0, **changes: Any) -> NARForImageGeneration:
    """In eval mode, and with output matrices that are not zero."""
    torch.manual_seed(seed)
    made = NARForImageGeneration(config(grid, **changes)).eval()
    for output in made.outputs:
        torch.nn.init.normal_(output.weight, std=0.3)
    return made


def condition(of: NARForImageGeneration, *, padded: bool = False) -> dict[str, Tensor]:
    """Two samples."""
    if of.config.condition == "none":
        return {}
    if of.config.condition == "class":
        return {"class_labels": torch.tensor([4, 1])}
    tokens = of.config.condition_tokens
    features = torch.randn(2, tokens, of.config.caption_size, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, tokens)
    if padded:
        mask[0, : tokens - 3] = 0
    return {"text_features": features, "text_mask": mask}


def random_ids(of: NARForImageGeneration, seed: int = 2, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, of.config.vocab_size, (batch, *of.config.grid_size), generator=generator)


def tokenizer(channels: int, folder: Path, vocabulary: int = 20) -> Path:
    """A tokenizer of 2 by 2 patches, saved in ``folder``."""
    pixels = torch.rand(40, channels, 6, 8, generator=torch.Generator().manual_seed(0))
    PatchTokenizer.fit(pixels, patch_size=2, codebook_size=vocabulary, seed=0, rounds=1).save_pretrained(folder)
    return folder

"""Models of tiny-raster's tokens by class: NAR, and what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from nar.cli import with_losses_apart
from raster.data import Split
from transformers import PreTrainedModel

from tersor import zoo
from tersor.grids.llamagen import LlamaGen, LlamaGenConfig
from tersor.grids.nar.baselines import PARConfig, PARForImageGeneration
from tersor.grids.nar.heads import NARForImageGeneration
from tersor.grids.nar.model import NARConfig
from tersor.grids.nar.tokens import Tokens
from tersor.grids.nar.training import NARTraining

KINDS = ("nar", "raster", "par4x", "par14x", "single-head")
#: Parts of PAR's grid from top to bottom and from left to right. Fourteen take as many passes as NAR.
REGIONS = {"par4x": (2, 2), "par14x": (7, 2)}
JUDGE = "tiny-raster"


@dataclass(frozen=True)
class Plan:
    """Sizes, which all kinds share, and the training.

    Args:
        images: How many to use; None uses all.
        looked_at: Held-out samples whose loss is followed.
    """

    training: NARTraining
    images: int | None = None
    hidden: int = 64
    layers: int = 8
    heads: int = 4
    dropout: float = 0.1
    looked_at: int = 500


#: Six and a half times through the data.
FULL = Plan(
    NARTraining(
        steps=12_000, batch_size=32, learning_rate=2e-3, schedule="cosine", warmup_steps=100, betas=(0.9, 0.98),
        evaluate_every=1200, save_every=400, seed=1,
    )
)  # fmt: skip
SMOKE = Plan(
    replace(FULL.training, steps=4, batch_size=4, warmup_steps=1, save_every=2, evaluate_every=2), images=280,
    hidden=32, layers=1, heads=2, looked_at=8,
)  # fmt: skip


def new_model(kind: str, plan: Plan, vocab_size: int, grid_size: tuple[int, int]) -> PreTrainedModel:
    """An untrained model of a kind; a pure function of its arguments.

    The single head stands on as many blocks as NAR's last one, so that it is not the smaller model.
    """
    shared: dict[str, Any] = {
        "vocab_size": vocab_size, "grid_size": grid_size, "hidden_size": plan.hidden, "num_hidden_layers": plan.layers,
        "num_attention_heads": plan.heads, "num_classes": 10, "condition_dropout": plan.dropout,
        "default_guidance": 1.0,
    }  # fmt: skip
    torch.manual_seed(plan.training.seed)
    if kind == "raster":
        return LlamaGen(LlamaGenConfig(**shared))
    if kind in REGIONS:
        return PARForImageGeneration(PARConfig(**shared, regions=REGIONS[kind]))
    # None of the compared models has dropout: so few steps do not overfit.
    none = dict.fromkeys(("token_dropout", "residual_dropout", "ffn_dropout"), 0.0)
    heads = (1,) if kind == "single-head" else None
    config = NARConfig(**shared, **none, head_layers=heads, flipped_axes=(1,))
    model = NARForImageGeneration(config)
    return with_losses_apart(model) if kind == "single-head" else model


def tokens_of(split: Split, plan: Plan, file: Path) -> tuple[Tokens, Tokens]:
    """Tokens to train on and held-out ones, encoded once."""
    tokenizer = zoo.load_image_tokenizer(JUDGE)
    if not file.is_file():
        pixels, labels = (
            torch.cat([split.train, split.held_out]),
            torch.cat([split.train_labels, split.held_out_labels]),
        )
        Tokens(tokenizer.encode(pixels), tokenizer.codebook_size, {"class_labels": labels}).save(file)
    tokens, held = Tokens.load(file), len(split.held_out)
    parts = [slice(0, len(tokens) - held), slice(len(tokens) - held, len(tokens) - held + plan.looked_at)]
    first, second = (
        Tokens(tokens.ids[part], tokens.vocab_size, {"class_labels": tokens.conditions["class_labels"][part]})
        for part in parts
    )
    return first, second

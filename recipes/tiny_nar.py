"""Rebuild tiny-nar: the tokens of tiny-raster from neighbour to neighbour, 27 forward passes an image instead of 196.

    python recipes/tiny_nar.py --data FOLDER --out OUT

FOLDER holds mnist_png.zip; 'mnist' fetches it, 'procedural' draws strokes instead and fetches nothing. Tokenizer and
classifier are those of tiny-raster, and so is the split. What NAR is compared with has the same backbone and is trained
by the same recipe and for as many steps:

    python recipes/tiny_nar.py --data FOLDER --out OUT --kind raster      (or par4x, par14x or single-head)

Each takes minutes on a GPU, which is used if there is one, and hours on a core. A run resumes where it was when started
again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from nar.cli import arguments, with_losses_apart
from nar.export import begun_on, export, floors_of, heads_alone, with_tokenizer
from raster.data import Split, load
from transformers import PreTrainedModel

from tersor import zoo
from tersor.grids.llamagen import LlamaGen, LlamaGenConfig
from tersor.grids.nar.baselines import PARConfig, PARForImageGeneration
from tersor.grids.nar.heads import NARConfig, NARForImageGeneration
from tersor.grids.nar.tokens import Tokens
from tersor.grids.nar.training import NARTraining, train

KINDS = ("nar", "raster", "par4x", "par14x", "single-head")
#: Of PAR, from top to bottom and from left to right. Fourteen take as many passes as NAR.
REGIONS = {"par4x": (2, 2), "par14x": (7, 2)}
JUDGE = "tiny-raster"


@dataclass(frozen=True)
class Plan:
    """Sizes, which all kinds share, and the training; ``images``: use this many, None for all."""

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


def main(argv: list[str] | None = None) -> int:
    """Encode, train and export; returns the exit code."""
    args = arguments("tiny-nar", argv, kinds=KINDS)
    plan = SMOKE if args.smoke else FULL
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        # The seed of tiny-raster's split, so that nothing held out there is trained on here.
        split = load(args.data, seed=1, count=plan.images, download=args.out)
        tokens, held_out = tokens_of(split, plan, args.out / "tokens.safetensors")
        model = new_model(args.kind, plan, tokens.vocab_size, (tokens.grid_size[0], tokens.grid_size[1]))
        begun = begun_on(args.out / args.kind)
        curve = train(model, tokens, plan.training, args.out / args.kind, held_out=held_out)
    except (ValueError, OSError) as error:
        print(f"tiny_nar: {error}", file=sys.stderr)
        return 2
    folder = args.out / "tiny-nar"
    scores = {}
    if isinstance(model, NARForImageGeneration) and args.kind == "nar":
        scores = heads_alone(model, held_out)
        scores |= floors_of(zoo.load_judge(JUDGE), zoo.load_image_tokenizer(JUDGE), split.train)
    lock = export(
        model, args.kind, plan, split, (curve, begun), out=folder, recipe="recipes/tiny_nar.py", scores=scores
    )
    with_tokenizer(folder, JUDGE)
    print(lock["scores"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

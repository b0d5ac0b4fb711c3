"""Rebuild tiny-nar-text: the tokens of tiny-raster from captions such as "a thick seven slanted left".

    python recipes/tiny_nar_text.py --data FOLDER --out OUT

FOLDER holds mnist_png.zip; 'mnist' fetches it, 'procedural' draws strokes instead and fetches nothing. Captions come
from measuring the pictures, see `tersor.grids.nar.captions`. A run resumes where it was when started again.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace

import torch
from nar.classes import FULL as BY_CLASS
from nar.classes import JUDGE, SMOKE, Plan
from nar.cli import arguments
from nar.export import begun_on, export, with_tokenizer
from raster.data import load, source_facts
from shared.run import refused
from torch import Tensor

from tersor import zoo
from tersor.grids.nar.captions import LONGEST, WORDS, Captions, caption
from tersor.grids.nar.heads import NARForImageGeneration
from tersor.grids.nar.model import NARConfig
from tersor.grids.nar.pipeline import WordFeatures
from tersor.grids.nar.tokens import Tokens
from tersor.grids.nar.training import train

#: Smaller than tiny-nar, and trained for fewer steps.
FULL = replace(
    BY_CLASS, layers=5,
    training=replace(BY_CLASS.training, steps=2400, batch_size=8, evaluate_every=400, save_every=200),
)  # fmt: skip
#: Share of the captions that leave stroke or slant out, each by itself.
LEFT_OUT = 0.2


def captions_of(captions: Captions, images: Tensor, labels: Tensor, *, seed: int) -> list[str]:
    """One of each image; a pure function of its arguments."""
    strokes, sides = captions.classes(images)
    generator = torch.Generator().manual_seed(seed)
    silent = torch.rand(len(images), 2, generator=generator) < LEFT_OUT
    strokes = torch.where(silent[:, 0], 1, strokes)
    rows = zip(labels.tolist(), strokes.tolist(), sides.tolist(), silent[:, 1].tolist(), strict=True)
    return [caption(digit, stroke, None if quiet else side) for digit, stroke, side, quiet in rows]


def tokens_of(captions: Captions, images: Tensor, labels: Tensor, *, seed: int) -> Tokens:
    """Image tokens with their text's features."""
    tokenizer = zoo.load_image_tokenizer(JUDGE)
    features, mask = WordFeatures(WORDS, LONGEST)(captions_of(captions, images, labels, seed=seed))
    conditions = {"text_features": features.half(), "text_mask": mask.byte()}
    return Tokens(tokenizer.encode(images), tokenizer.codebook_size, conditions)


def new_model(plan: Plan, tokens: Tokens) -> NARForImageGeneration:
    """An untrained model; a pure function of its arguments."""
    torch.manual_seed(plan.training.seed)
    return NARForImageGeneration(
        NARConfig(
            vocab_size=tokens.vocab_size,
            grid_size=tokens.grid_size,
            hidden_size=plan.hidden,
            num_hidden_layers=plan.layers,
            num_attention_heads=plan.heads,
            condition="text",
            condition_tokens=LONGEST,
            caption_size=len(WORDS),
            condition_dropout=plan.dropout,
            default_guidance=1.0,
            token_dropout=0.0,
            residual_dropout=0.0,
            ffn_dropout=0.0,
        )
    )


def main(argv: list[str] | None = None) -> int:
    """Encode, train and export; returns the exit code."""
    args = arguments("tiny-nar-text", argv)
    plan = SMOKE if args.smoke else FULL
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        split = load(args.data, seed=1, count=plan.images, download=args.out)
        captions = Captions.fit(split.train)
        tokens = tokens_of(captions, split.train, split.train_labels, seed=plan.training.seed)
        held_out = tokens_of(
            captions,
            split.held_out[: plan.looked_at],
            split.held_out_labels[: plan.looked_at],
            seed=plan.training.seed + 1,
        )
        model = new_model(plan, tokens)
        begun = begun_on(args.out / "text")
        curve = train(model, tokens, plan.training, args.out / "text", held_out=held_out)
    except (ValueError, OSError) as error:
        return refused("tiny_nar_text", error)
    folder = args.out / "tiny-nar-text"
    facts = {"recipe": "recipes/tiny_nar_text.py", "kind": "nar", **source_facts(split), "plan": asdict(plan), **begun}
    lock = export(model, facts, curve, out=folder)
    with_tokenizer(folder, JUDGE)
    captions.save(folder)
    print(lock["scores"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

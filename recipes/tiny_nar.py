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
from dataclasses import asdict

from nar.classes import FULL, JUDGE, KINDS, SMOKE, new_model, tokens_of
from nar.cli import arguments
from nar.export import begun_on, export, floors_of, heads_alone, with_tokenizer
from raster.data import load, source_facts
from shared.run import refused

from tersor import zoo
from tersor.grids.nar.heads import NARForImageGeneration
from tersor.grids.nar.training import train


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
        return refused("tiny_nar", error)
    folder = args.out / "tiny-nar"
    scores = {}
    if isinstance(model, NARForImageGeneration) and args.kind == "nar":
        scores = heads_alone(model, held_out)
        scores |= floors_of(zoo.load_judge(JUDGE), zoo.load_image_tokenizer(JUDGE), split.train)
    facts = {"recipe": "recipes/tiny_nar.py", "kind": args.kind, **source_facts(split), "plan": asdict(plan), **begun}
    lock = export(model, facts, curve, out=folder, scores=scores)
    with_tokenizer(folder, JUDGE)
    print(lock["scores"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Rebuild tiny-raster: a class-conditional raster image transformer of a million parameters on a 14 by 14 grid.

    python recipes/tiny_raster.py --data FOLDER --out OUT

FOLDER holds mnist_png.zip; 'mnist' fetches it, 'procedural' draws strokes instead and fetches nothing. Takes about 20
minutes on two CPU cores: a codebook of patches, a classifier, then the transformer. It resumes where it was when
started again.
"""

from __future__ import annotations

import sys

from raster.data import load
from raster.export import export
from raster.train import SMOKE, Plan, Trainer, fit_tokenizer, train_classifier
from shared.run import command_line, parse_and_prepare, refused


def main(argv: list[str] | None = None) -> int:
    """Fit, train, score and export; returns the exit code."""
    parser = command_line("tiny-raster")
    parser.add_argument("--data", default="mnist", help="folder with mnist_png.zip, 'mnist' to fetch, or 'procedural'")
    args = parse_and_prepare(parser, argv)
    plan = SMOKE if args.smoke else Plan()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        split = load(args.data, seed=args.seed, count=plan.images, download=args.out)
        tokenizer = fit_tokenizer(plan, split, args.seed, args.out / "tokenizer")
        judge = train_classifier(plan, split, args.seed, args.out / "classifier")
        trainer = Trainer(plan, args.seed, tokenizer, split, args.out / "state.pt")
    except (ValueError, OSError) as error:
        return refused("tiny_raster", error)
    trainer.run(look_every=2 if args.smoke else 200, looked_at=16 if args.smoke else 200)
    images = 100 if args.smoke else 3000
    lock = export(trainer, tokenizer, judge, split, out=args.out / "tiny-raster", floor_images=images)
    print(lock["scores"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

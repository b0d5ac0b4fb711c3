"""Rebuild tiny-nar-video: moving digits as 4 by 7 by 7 tokens, 16 forward passes a clip instead of 196.

    python recipes/tiny_nar_video.py --data FOLDER --out OUT

FOLDER holds mnist_png.zip; 'mnist' fetches it, 'procedural' draws strokes instead and fetches nothing. A codebook of
blocks of 2 frames by 4 by 4 pixels, a classifier of digit and direction, then the transformer. With ``--kind`` raster
or single-head it makes what NAR is compared with, by the same recipe. Each takes minutes on a GPU, which is used if
there is one, and hours on a core. A run resumes where it was when started again.
"""

from __future__ import annotations

import sys
from dataclasses import asdict

from nar.cli import arguments
from nar.clips import clips_of
from nar.export import begun_on, export, heads_alone
from nar.video import FULL, KINDS, SMOKE, export_video, fit_tokenizer, new_model, train_judge
from raster.data import load, source_facts
from shared.run import refused

from tersor.grids.nar.heads import NARForImageGeneration
from tersor.grids.nar.tokens import Tokens
from tersor.grids.nar.training import train


def main(argv: list[str] | None = None) -> int:
    """Fit, train and export; returns the exit code."""
    args = arguments("tiny-nar-video", argv, kinds=KINDS)
    plan = SMOKE if args.smoke else FULL
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        split = load(args.data, seed=1, count=plan.images, download=args.out)
        clips, held_out = clips_of(split)
        tokenizer = fit_tokenizer(plan, split, clips, args.out / "tokenizer")
        judge = train_judge(plan, split, held_out, tokenizer, args.out / "classifier")
        tokens, others = (
            Tokens(tokenizer.encode(each.pixels[:count]), plan.codebook, {"class_labels": each.digits[:count]})
            for each, count in ((clips, len(clips.pixels)), (held_out, plan.looked_at))
        )
        model = new_model(args.kind, plan, (tokens.grid_size[0], tokens.grid_size[1], tokens.grid_size[2]))
        begun = begun_on(args.out / args.kind)
        curve = train(model, tokens, plan.training, args.out / args.kind, held_out=others)
    except (ValueError, OSError) as error:
        return refused("tiny_nar_video", error)
    folder = args.out / "tiny-nar-video"
    scores = {}
    if isinstance(model, NARForImageGeneration) and args.kind == "nar":
        scores = heads_alone(model, others) | export_video(tokenizer, judge, (clips, held_out), out=folder)
    facts = {"recipe": "recipes/tiny_nar_video.py", "kind": args.kind, **source_facts(split), "plan": asdict(plan)}
    lock = export(model, facts | begun, curve, out=folder, scores=scores)
    print(lock["scores"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

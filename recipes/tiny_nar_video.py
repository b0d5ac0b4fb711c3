"""Rebuild tiny-nar-video: moving digits as 4 by 7 by 7 tokens, 16 forward passes a clip instead of 196.

    python recipes/tiny_nar_video.py --data FOLDER --out OUT

FOLDER holds mnist_png.zip; 'mnist' fetches it, 'procedural' draws strokes instead and fetches nothing. A codebook of
blocks of 2 frames by 4 by 4 pixels, a classifier of digit and direction, then the transformer. With ``--kind`` raster
or single-head it makes what NAR is compared with, by the same recipe. Each takes minutes on a GPU, which is used if
there is one, and hours on a core. A run resumes where it was when started again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_nar_cli import arguments, with_losses_apart
from tiny_nar_clips import Clips, clips_of, judged_clips
from tiny_nar_export import begun_on, export, export_video, heads_alone, restored
from tiny_raster import seed_of
from tiny_raster_data import Split, load
from training_state import made_once
from transformers import PreTrainedModel

from tersor.grids.judge import ClipClassifier, Reference, load_judge, save_judge
from tersor.grids.nar.baselines import RasterVideo, RasterVideoConfig
from tersor.grids.nar.heads import NARConfig, NARForImageGeneration
from tersor.grids.nar.pipeline import TubeletTokenizer
from tersor.grids.nar.tokens import Tokens
from tersor.grids.nar.training import NARTraining, train
from tersor.grids.tokenizer import PatchTokenizer

KINDS = ("nar", "raster", "single-head")
#: Frames of a token.
DEPTH = 2


@dataclass(frozen=True)
class Plan:
    """Sizes, which all kinds share, and the training; ``images``: use this many, None for all.

    ``epochs``: of the classifier, over ``judged`` clips. ``rounds``: of the codebook.
    """

    training: NARTraining
    images: int | None = None
    patch: int = 4
    codebook: int = 128
    rounds: int = 25
    judged: int = 30_000
    epochs: int = 6
    hidden: int = 64
    layers: int = 14
    heads: int = 4
    dropout: float = 0.1
    looked_at: int = 500


#: Nearly five times through the data.
FULL = Plan(
    NARTraining(
        steps=8800, batch_size=32, learning_rate=3e-3, schedule="cosine", warmup_steps=100, betas=(0.9, 0.98),
        evaluate_every=880, save_every=400, seed=1,
    )
)  # fmt: skip
SMOKE = Plan(
    replace(FULL.training, steps=4, batch_size=4, warmup_steps=1, save_every=2, evaluate_every=2), images=280, rounds=2,
    codebook=32, judged=100, epochs=1, hidden=32, layers=1, heads=2, looked_at=8,
)  # fmt: skip


def new_model(kind: str, plan: Plan, grid: tuple[int, int, int]) -> PreTrainedModel:
    """An untrained model of a kind; a pure function of its arguments."""
    shared: dict[str, Any] = {
        "vocab_size": plan.codebook, "hidden_size": plan.hidden, "num_hidden_layers": plan.layers,
        "num_attention_heads": plan.heads, "num_classes": 10, "condition_dropout": plan.dropout,
        "default_guidance": 1.0,
    }  # fmt: skip
    torch.manual_seed(plan.training.seed)
    if kind == "raster":
        return RasterVideo(RasterVideoConfig(**shared, grid_size=(grid[0] * grid[1], grid[2]), frames=grid[0]))
    none = dict.fromkeys(("token_dropout", "residual_dropout", "ffn_dropout"), 0.0)
    # Of a clip that moves by a pixel a frame the head of the later frame says most: it alone has a further block. One
    # for the head below, too, learns no more and is a fifteenth of a pass. The single head has as many as two heads.
    heads = (2,) if kind == "single-head" else (0, 0, 1)
    config = NARConfig(**shared, **none, grid_size=grid, flipped_axes=(2,), head_layers=heads)
    model = NARForImageGeneration(config)
    return with_losses_apart(model) if kind == "single-head" else model


def fit_tokenizer(plan: Plan, clips: Clips, folder: Path) -> TubeletTokenizer:
    """The codebook, from ``folder`` if an earlier run has left it there."""

    def fit(target: Path) -> None:
        stacked = clips.pixels[:20_000].reshape(-1, DEPTH, *clips.pixels.shape[-2:])
        PatchTokenizer.fit(
            stacked,
            patch_size=plan.patch,
            codebook_size=plan.codebook,
            seed=plan.training.seed,
            rounds=plan.rounds,
            most_patches=200_000,
            on_progress=lambda number, error: print(f"codebook, round {number}: error {error:.6f}", flush=True),
        ).save_pretrained(target)

    made_once(folder, fit)
    return TubeletTokenizer(PatchTokenizer.from_pretrained(folder), DEPTH)


def train_judge(
    plan: Plan, split: Split, held_out: Clips, tokenizer: TubeletTokenizer, folder: Path
) -> tuple[ClipClassifier, Reference]:
    """Classifier of clips and what it sees in the held-out ones' reconstructions, from ``folder`` if they are there.

    Samples are compared with real clips as their tokens show them. What the tokenizer loses is the same for all models
    and more than what they add, and sharper samples than the model's own would come nearer to clips without that loss
    than these are. Half of what the classifier learns from went through the tokenizer, too.
    """

    def fit(target: Path) -> None:
        seed = plan.training.seed
        torch.manual_seed(seed)
        judge = ClipClassifier()
        optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
        chosen = min(plan.judged, len(split.train))
        clips = judged_clips(split, seed=seed, count=chosen)
        clips.pixels[::2] = restored(tokenizer, clips.pixels[::2])
        steps = plan.epochs * -(-chosen // 50)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.02, 1 - step / steps))
        for epoch in range(plan.epochs):
            order = torch.randperm(chosen, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))
            for rows in order.split(50):
                features = judge.features(clips.pixels[rows])
                loss = F.cross_entropy(judge.output(features), clips.digits[rows])
                loss = loss + F.cross_entropy(judge.direction(features), clips.directions[rows])
                loss.backward()
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            _, guesses = judge.judge(held_out.pixels)
            right = (guesses == held_out.digits).float().mean()
            print(f"classifier, epoch {epoch + 1}: {100 * right:.2f} % of digits right", flush=True)
        features, _ = judge.judge(restored(tokenizer, held_out.pixels))
        save_judge(target, judge.eval(), Reference.of(features, held_out.digits))

    made_once(folder, fit)
    judge, reference = load_judge(folder)
    assert isinstance(judge, ClipClassifier)
    return judge, reference


def main(argv: list[str] | None = None) -> int:
    """Fit, train and export; returns the exit code."""
    args = arguments("tiny-nar-video", argv, kinds=KINDS)
    plan = SMOKE if args.smoke else FULL
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        split = load(args.data, seed=1, count=plan.images, download=args.out)
        clips, held_out = clips_of(split)
        tokenizer = fit_tokenizer(plan, clips, args.out / "tokenizer")
        judge = train_judge(plan, split, held_out, tokenizer, args.out / "classifier")
        tokens, others = (
            Tokens(tokenizer.encode(each.pixels[:count]), plan.codebook, {"class_labels": each.digits[:count]})
            for each, count in ((clips, len(clips.pixels)), (held_out, plan.looked_at))
        )
        model = new_model(args.kind, plan, (tokens.grid_size[0], tokens.grid_size[1], tokens.grid_size[2]))
        begun = begun_on(args.out / args.kind)
        curve = train(model, tokens, plan.training, args.out / args.kind, held_out=others)
    except (ValueError, OSError) as error:
        print(f"tiny_nar_video: {error}", file=sys.stderr)
        return 2
    folder = args.out / "tiny-nar-video"
    scores = {}
    if isinstance(model, NARForImageGeneration) and args.kind == "nar":
        scores = heads_alone(model, others) | export_video(tokenizer, judge, (clips, held_out), out=folder)
    recipe = "recipes/tiny_nar_video.py"
    lock = export(model, args.kind, plan, split, (curve, begun), out=folder, recipe=recipe, scores=scores)
    print(lock["scores"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Models of moving digits: a tokenizer of tubelets, a classifier of clips, NAR, and what it is compared with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from nar.cli import with_losses_apart
from nar.clips import Clips, judged_clips
from nar.export import floors_of
from raster.data import Split, source_facts
from shared.lock import share_of
from torch import Tensor
from transformers import PreTrainedModel

from tersor.bench.measure import seed_of
from tersor.grids.judge import ClipClassifier, Reference, load_judge, save_judge
from tersor.grids.nar.baselines import RasterVideo, RasterVideoConfig
from tersor.grids.nar.heads import NARForImageGeneration
from tersor.grids.nar.model import NARConfig
from tersor.grids.nar.pipeline import TubeletTokenizer
from tersor.grids.nar.training import NARTraining
from tersor.grids.tokenizer import PatchTokenizer
from tersor.training.claim import made_once

KINDS = ("nar", "raster", "single-head")
#: Frames of a token.
DEPTH = 2


@dataclass(frozen=True)
class Plan:
    """Sizes, which all kinds share, and the training.

    Args:
        images: How many to use; None uses all.
        rounds: Of k-means, for the codebook.
        judged: Clips that the classifier learns from.
        epochs: Passes of the classifier over them.
        looked_at: Held-out samples whose loss is followed.
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


def fit_tokenizer(plan: Plan, split: Split, clips: Clips, folder: Path) -> TubeletTokenizer:
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

    made_once(folder, {"plan": asdict(plan), **source_facts(split)}, fit)
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

    made_once(folder, {"plan": asdict(plan), **source_facts(split)}, fit)
    judge, reference = load_judge(folder)
    assert isinstance(judge, ClipClassifier)
    return judge, reference


def restored(tokenizer: TubeletTokenizer, clips: Tensor) -> Tensor:
    """Clips as their tokens show them."""
    return torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in clips.split(500)])


def export_video(
    tokenizer: TubeletTokenizer, judge: tuple[ClipClassifier, Reference], clips: tuple[Clips, Clips], *, out: Path
) -> dict[str, Any]:
    """Write tokenizer and classifier of clips; returns their scores on held-out clips."""
    classifier, reference = judge
    train, held_out = clips
    tokenizer.tokenizer.save_pretrained(out / "tokenizer")
    save_judge(out / "classifier", classifier, reference)
    features, guesses = classifier.judge(held_out.pixels)
    toward = classifier.direction(features).argmax(-1)
    again = restored(tokenizer, held_out.pixels)
    _, seen = classifier.judge(again)

    def right(hits: Tensor) -> dict[str, float]:
        return share_of(int(hits.sum()), len(hits))

    return {
        "reconstruction_mse": round((again - held_out.pixels).square().mean().item(), 6),
        "classifier_accuracy": right(guesses == held_out.digits),
        "direction_accuracy": right(toward == held_out.directions),
        "classifier_accuracy_reconstructed": right(seen == held_out.digits),
        **floors_of(judge, tokenizer, train.pixels),
    }

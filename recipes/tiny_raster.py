"""Rebuild tiny-raster: a class-conditional raster image transformer of a million parameters on a 14 by 14 grid.

    python recipes/tiny_raster.py --data FOLDER --out OUT

FOLDER holds mnist_png.zip; 'mnist' fetches it, 'procedural' draws strokes instead and fetches nothing. Takes about 20
minutes on two CPU cores: a codebook of patches, a classifier, then the transformer. It resumes where it was when
started again.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_raster_data import Split, load
from tiny_raster_export import export, held_out_loss
from torch import Tensor
from training_state import command_line, load_state, made_once, save_state, started

from tersor.grids.judge import DigitClassifier, Reference, load_judge, save_judge
from tersor.grids.llamagen import LlamaGen, LlamaGenConfig
from tersor.grids.tokenizer import PatchTokenizer

SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class Plan:
    """Sizes and lengths of the three parts.

    ``images``: use this many, None for all. ``epochs``: of the classifier. ``steps``, ``batch``, ``rate``: of the
    transformer, whose rate warms up and then falls as a cosine to 3 %.
    """

    images: int | None = None
    patch: int = 2
    codebook: int = 128
    rounds: int = 40
    epochs: int = 4
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    steps: int = 2400
    batch: int = 32
    rate: float = 2e-3
    warmup: int = 100
    dropout: float = 0.1


SMOKE = Plan(images=2100, rounds=3, epochs=1, hidden=32, layers=2, heads=2, steps=4, batch=4)


@dataclass
class Progress:
    """What a run knows about its past; part of the state file."""

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


def seed_of(seed: int, step: int) -> int:
    """The seed of what is random in a step, so that a resumed run draws the same."""
    return (seed * 1_000_003 + step) % 2**31


def fit_tokenizer(plan: Plan, split: Split, seed: int, folder: Path) -> PatchTokenizer:
    """The codebook, from ``folder`` if an earlier run has left it there."""

    def fit(target: Path) -> None:
        PatchTokenizer.fit(
            split.train,
            patch_size=plan.patch,
            codebook_size=plan.codebook,
            seed=seed,
            rounds=plan.rounds,
            on_progress=lambda number, error: print(f"codebook, round {number}: error {error:.6f}", flush=True),
        ).save_pretrained(target)

    made_once(folder, fit)
    return PatchTokenizer.from_pretrained(folder)


def train_classifier(plan: Plan, split: Split, seed: int, folder: Path) -> tuple[DigitClassifier, Reference]:
    """Classifier, and what it sees in the held-out images, from ``folder`` if they are there."""

    def fit(target: Path) -> None:
        torch.manual_seed(seed)
        classifier = DigitClassifier()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
        batches = len(split.train) // 100
        for epoch in range(plan.epochs):
            order = torch.randperm(len(split.train), generator=torch.Generator().manual_seed(seed_of(seed, epoch)))
            for index, rows in enumerate(order.split(100)):
                for group in optimizer.param_groups:
                    group["lr"] = 2e-3 * max(0.02, 1 - (epoch * batches + index) / (plan.epochs * batches))
                loss = F.cross_entropy(classifier(split.train[rows]), split.train_labels[rows])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            _, guesses = classifier.judge(split.held_out)
            right = (guesses == split.held_out_labels).float().mean()
            print(f"classifier, epoch {epoch + 1}: {100 * right:.2f} % right", flush=True)
        features, _ = classifier.judge(split.held_out)
        save_judge(target, classifier.eval(), Reference.of(features, split.held_out_labels))

    made_once(folder, fit)
    return load_judge(folder)


class Trainer:
    """Transformer, optimizer and progress; `run` trains to the end, and what it saves is enough to go on."""

    def __init__(self, plan: Plan, seed: int, tokenizer: PatchTokenizer, split: Split, state: Path) -> None:
        self.plan, self.seed, self.state = plan, seed, state
        self.ids, self.labels = tokenizer.encode(split.train).flatten(1), split.train_labels
        self.held_out_ids, self.held_out_labels = tokenizer.encode(split.held_out).flatten(1), split.held_out_labels
        torch.manual_seed(seed)
        self.model = LlamaGen(
            LlamaGenConfig(
                vocab_size=plan.codebook,
                hidden_size=plan.hidden,
                num_hidden_layers=plan.layers,
                num_attention_heads=plan.heads,
                num_classes=10,
                grid_size=tokenizer.grid_size((split.train.shape[2], split.train.shape[3])),
                default_guidance=1.0,
                condition_dropout=plan.dropout,
            )
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.05)
        resumed = load_state(state, plan=plan, seed=seed, model=self.model, optimizer=self.optimizer)
        self.progress = Progress(**resumed)

    def save(self) -> None:
        save_state(
            self.state,
            plan=self.plan,
            seed=self.seed,
            model=self.model,
            optimizer=self.optimizer,
            progress=self.progress,
        )

    def rate(self) -> float:
        """Warm-up, then a cosine from the full rate to 3 % of it."""
        step, plan = self.progress.step, self.plan
        cosine = (1 + torch.cos(torch.tensor(torch.pi * step / plan.steps)).item()) / 2
        return plan.rate * min(1.0, (step + 1) / plan.warmup) * (0.03 + 0.97 * cosine)

    def train_step(self) -> float:
        """One optimizer step; returns the loss in nats a token."""
        # Which samples lose their class is drawn from the global state.
        torch.manual_seed(seed_of(self.seed, self.progress.step))
        rows = torch.randint(len(self.ids), (self.plan.batch,))
        loss = self._loss(self.ids[rows], self.labels[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(input_ids=ids[:, :-1], class_labels=labels, labels=ids).loss

    def run(self, *, look_every: int, looked_at: int) -> None:
        """Train to the end of the plan, with the held-out loss every ``look_every`` steps."""
        progress, saved = self.progress, time.monotonic()
        while progress.step < self.plan.steps:
            started = time.monotonic()
            loss = self.train_step()
            progress.step += 1
            progress.seconds += time.monotonic() - started
            done = progress.step == self.plan.steps
            if progress.step % look_every == 0 or done:
                held_out = held_out_loss(self.model, self.held_out_ids[:looked_at], self.held_out_labels[:looked_at])
                row = {
                    "step": progress.step, "minutes": round(progress.seconds / 60, 1), "loss": round(loss, 4),
                    "held_out": round(held_out, 4),
                }  # fmt: skip
                progress.curve.append(row)
                print(row, flush=True)
            if time.monotonic() - saved > SAVE_EVERY_S or done:
                self.save()
                saved = time.monotonic()


def main(argv: list[str] | None = None) -> int:
    """Fit, train, score and export; returns the exit code."""
    parser = command_line("tiny-raster")
    parser.add_argument("--data", default="mnist", help="folder with mnist_png.zip, 'mnist' to fetch, or 'procedural'")
    args = started(parser, argv)
    plan = SMOKE if args.smoke else Plan()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        split = load(args.data, seed=args.seed, count=plan.images, download=args.out)
        tokenizer = fit_tokenizer(plan, split, args.seed, args.out / "tokenizer")
        judge = train_classifier(plan, split, args.seed, args.out / "classifier")
        trainer = Trainer(plan, args.seed, tokenizer, split, args.out / "state.pt")
    except (ValueError, OSError) as error:
        print(f"tiny_raster: {error}", file=sys.stderr)
        return 2
    trainer.run(look_every=2 if args.smoke else 200, looked_at=16 if args.smoke else 200)
    lock = export(
        trainer, tokenizer, judge, split, out=args.out / "tiny-raster", floor_images=100 if args.smoke else 3000
    )
    print(lock["scores"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

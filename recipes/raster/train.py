"""The three parts of tiny-raster: a codebook of patches, a classifier, and the transformer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from raster.data import Split, source_facts
from shared.run import Progress, Run, set_rate
from torch import Tensor

from tersor.bench.measure import seed_of
from tersor.grids.judge import DigitClassifier, Reference, load_judge, save_judge
from tersor.grids.llamagen import LlamaGen, LlamaGenConfig
from tersor.grids.tokenizer import PatchTokenizer
from tersor.training.claim import made_once


@dataclass(frozen=True)
class Plan:
    """Sizes and lengths of the three parts.

    The transformer's rate warms up and then falls as a cosine to 3 %.

    Args:
        images: How many to use; None uses all.
        epochs: Passes of the classifier over the images.
        steps: Optimizer steps of the transformer.
        batch: Images a step of the transformer.
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

    made_once(folder, {"plan": asdict(plan), "seed": seed, **source_facts(split)}, fit)
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
                set_rate(optimizer, 2e-3 * max(0.02, 1 - (epoch * batches + index) / (plan.epochs * batches)))
                loss = F.cross_entropy(classifier(split.train[rows]), split.train_labels[rows])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            _, guesses = classifier.judge(split.held_out)
            right = (guesses == split.held_out_labels).float().mean()
            print(f"classifier, epoch {epoch + 1}: {100 * right:.2f} % right", flush=True)
        features, _ = classifier.judge(split.held_out)
        save_judge(target, classifier.eval(), Reference.of(features, split.held_out_labels))

    made_once(folder, {"plan": asdict(plan), "seed": seed, **source_facts(split)}, fit)
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
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.05)
        self.kept = Run(state, plan, seed, self.model, optimizer, Progress())
        self.optimizer, self.progress = optimizer, self.kept.progress

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
        set_rate(self.optimizer, self.rate())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(input_ids=ids[:, :-1], class_labels=labels, labels=ids).loss

    def run(self, *, look_every: int, looked_at: int) -> None:
        """Train to the end of the plan, with the held-out loss every ``look_every`` steps."""
        progress, run = self.progress, self.kept
        while progress.step < self.plan.steps:
            loss = run.advance(self.train_step)
            done = progress.step == self.plan.steps
            if progress.step % look_every == 0 or done:
                held_out = held_out_loss(self.model, self.held_out_ids[:looked_at], self.held_out_labels[:looked_at])
                run.note({
                    "step": progress.step, "minutes": round(progress.seconds / 60, 1), "loss": round(loss, 4),
                    "held_out": round(held_out, 4),
                })  # fmt: skip
            run.save(now=done)


@torch.no_grad()
def held_out_loss(model: LlamaGen, ids: Tensor, labels: Tensor) -> float:
    """Mean loss in nats a token of images ``[n, cells]``, each with its class."""
    model.eval()
    total = 0.0
    for part, classes in zip(ids.split(50), labels.split(50), strict=True):
        total += len(part) * model(input_ids=part[:, :-1], class_labels=classes, labels=part).loss.item()
    return total / len(ids)

"""Training of tiny-repvgg and tiny-mobileone: one cycle of the rate over augmented images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from shared.run import Progress, Run, set_rate
from torch import Tensor, nn

from tersor.bench.measure import seed_of
from tersor.ptq.bench.data import Labelled
from tersor.ptq.networks import RepNet


@dataclass(frozen=True)
class Plan:
    """Length and rates of the training: one cycle, whose rate rises over the first third and falls to nothing.

    Args:
        smoothing: How much of a label goes to the other classes.
        pad: Pixels around an image that random crops may take.
        bfloat16: Whether to compute in it, which is faster on a CPU but for depthwise convolutions.
        images: How many to use; None uses all.
    """

    epochs: int = 7
    batch: int = 128
    rate: float = 0.2
    momentum: float = 0.9
    decay: float = 1e-4
    smoothing: float = 0.05
    pad: int = 4
    bfloat16: bool = True
    images: int | None = None


PLANS = {"repvgg": Plan(), "mobileone": Plan(epochs=6, bfloat16=False)}
SMOKE = Plan(epochs=1, batch=16, images=64)


def optimizer_of(net: nn.Module, plan: Plan) -> torch.optim.SGD:
    """Only kernels decay: the norms' factors decide what merging gives."""
    kernels = [each for each in net.parameters() if each.ndim > 1]
    others = [each for each in net.parameters() if each.ndim == 1]
    groups = [{"params": kernels, "weight_decay": plan.decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=plan.rate, momentum=plan.momentum, nesterov=True)


def rate_at(plan: Plan, step: int, steps: int) -> float:
    """Linear to the peak at 30 % of the steps, linear to nothing at the end."""
    share = step / steps
    return plan.rate * (share / 0.3 if share < 0.3 else (1 - share) / 0.7)


def augment(pixels: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Crops at random places of the padded images, every other one mirrored."""
    count, _, side, _ = pixels.shape
    padded = F.pad(pixels, [pad] * 4)
    top, left = torch.randint(0, 2 * pad + 1, (2, count), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    columns = left[:, None] + torch.arange(side)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    rows = top[:, None] + torch.arange(side)
    index = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(net: RepNet, data: Labelled, plan: Plan, seed: int, state: Path) -> Progress:
    """Train ``net`` in place, going on where ``state`` is; its curve has a row an epoch."""
    optimizer = optimizer_of(net, plan)
    run = Run(state, plan, seed, net, optimizer, Progress())
    progress = run.progress
    count = min(len(data), plan.images or len(data))
    an_epoch = count // plan.batch
    steps = plan.epochs * an_epoch
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def train_step() -> float:
        epoch, place = divmod(progress.step, an_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))
        generator = torch.Generator().manual_seed(seed_of(seed, 1_000 + progress.step))
        rows = order[place * plan.batch : (place + 1) * plan.batch]
        images = net.normalize(augment(data.pixels[rows], plan.pad, generator))
        set_rate(optimizer, rate_at(plan, progress.step + 1, steps))
        net.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.bfloat16):
            logits = net(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), data.labels[rows], label_smoothing=plan.smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    while progress.step < steps:
        loss = run.advance(train_step)
        if progress.step % an_epoch == 0:
            # The curve shows training images: held-out ones are scored once, at the end.
            minutes = round(progress.seconds / 60, 1)
            run.note({"epoch": progress.step // an_epoch, "loss": round(loss, 4), "minutes": minutes})
        run.save(now=progress.step == steps)
    return progress

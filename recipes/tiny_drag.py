"""Rebuild tiny-drag: a tiny Stable Video Diffusion pipeline, and a control branch that drags what is in its world.

    python recipes/tiny_drag.py --out OUT

Nothing is read or fetched: the clips are drawn from the seed. A run resumes where it was when started again.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import Any

import torch
from drag.base import SECOND, BasePlan, new_pipeline, scored, train_unet, train_vae
from drag.export import export
from shared.run import command_line, parse_and_prepare, refused

from tersor.drag.bench.arms import new_arm
from tersor.drag.bench.table import Plan
from tersor.drag.bench.world import World, with_plain
from tersor.drag.training import CURVE, train

NAME = "tiny-drag"


def main(argv: list[str] | None = None) -> int:
    """Draw, train and export; returns the exit code."""
    args = parse_and_prepare(command_line(NAME), argv)
    base, second, branch = BasePlan(), SECOND, Plan(updates=500)
    if args.smoke:
        base = second = BasePlan(vae_steps=2, unet_steps=2, batch_size=2, clips=8)
        branch = replace(branch, updates=2, batch_size=2, clips=8)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        world = World(base.clips, args.seed)
        clips = [world[index] for index in range(base.clips)]
        svd = new_pipeline(args.seed)
        runs = [
            train_vae(svd, clips, base, args.seed, args.out / "vae.pt"),
            train_unet(svd, clips, base, args.seed, args.out / "unet.pt"),
        ]
        clips = with_plain(clips, args.seed)
        runs.append(train_unet(svd, clips, second, args.seed + 1, args.out / "unet-second.pt"))
        svd.unet.eval()
        pipe = new_arm(svd, "entity + Gaussian", name=NAME, seed=args.seed)
        plan = branch.training(args.seed)
        losses = train(pipe, clips[: branch.clips], plan, args.out / "branch", on_step=_said)
        seconds = json.loads((args.out / "branch" / CURVE).read_text(encoding="utf-8"))["seconds"]
    except (ValueError, OSError) as error:
        return refused("tiny_drag", error)
    pipe.controlnet.eval()
    minutes = (sum(run.seconds for run in runs) + seconds) / 60
    curve = [row for run in runs for row in run.curve]
    held_out = World(40, args.seed + 1)
    facts: dict[str, Any] = {
        "recipe": "recipes/tiny_drag.py", "seed": args.seed, "base": asdict(base),
        "second": asdict(second), "branch": asdict(plan),
        "minutes": round(minutes, 1), "curve": curve, "branch_losses": _tenths(losses),
        "scores": {"vae": scored(svd, [held_out[index] for index in range(len(held_out))])},
    }  # fmt: skip
    print(export(pipe, facts, args.out / NAME)["scores"], flush=True)
    return 0


def _said(step: int, steps: int, loss: float) -> None:
    if step % 50 == 0:
        print({"branch": step, "loss": round(loss, 4)}, flush=True)


def _tenths(losses: list[float]) -> list[float]:
    """Means of ten stretches of a curve."""
    parts = torch.tensor(losses).tensor_split(min(10, len(losses)))
    return [round(each.mean().item(), 4) for each in parts]


if __name__ == "__main__":
    sys.exit(main())

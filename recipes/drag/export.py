"""tiny-drag's folder: a saved pipeline in half precision, its lock and its card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from shared.lock import Lock, write_lock

from tersor.drag.bench.world import FRAMES, KINDS, SIDE
from tersor.drag.pipeline import DragAnythingPipeline

PARTS = ("unet", "controlnet", "vae", "image_encoder")


def export(pipe: DragAnythingPipeline, facts: dict[str, Any], out: Path) -> Lock:
    """Write everything; the folder appears when it is whole. Returns the lock."""
    counts = {name: sum(each.numel() for each in getattr(pipe, name).parameters()) for name in PARTS}
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in PARTS:
        torch.nn.Module.to(getattr(pipe, name), torch.float16)
    pipe.save_pretrained(partial)
    lock = write_lock(partial, {**facts, "parameters": counts}, card)
    shutil.rmtree(out, ignore_errors=True)
    partial.replace(out)
    for name in PARTS:
        torch.nn.Module.to(getattr(pipe, name), torch.float32)
    return lock


def card(lock: Lock) -> str:
    """The model card as Markdown; every figure comes from the lock."""
    base, second, branch = lock["base"], lock["second"], lock["branch"]
    counts, scores = lock["parameters"], lock["scores"]
    kinds = "; ".join(f"{name}: {what}" for name, what in KINDS.items())
    return f"""# tiny-drag

A DragAnything pipeline of the real classes (`UNetSpatioTemporalConditionModel`, `AutoencoderKLTemporalDecoder`,
`CLIPVisionModelWithProjection`, `SpatioTemporalControlNetModel`) that makes clips of {FRAMES} frames of {SIDE} x {SIDE}
pixels. Parameters: UNet {counts["unet"]:,}, control branch {counts["controlnet"]:,}, autoencoder {counts["vae"]:,},
image encoder {counts["image_encoder"]:,}. Weights are stored in half precision.

It knows a world of textured layers alone ({kinds}), and is no video model.

- The **autoencoder** halves the sides and has 8 channels, where Stable Video Diffusion's has 4.
- The **image encoder** has random weights, as it was drawn.
- **Entity features** are the means of the autoencoder's latents: they say little more than colours.
- Its loss was over **everything**, not over the entities alone as in the paper, and no entity was left out.
- One in eight **clips is of one colour** in the UNet's second round and in the training of the branch, with masks
  and paths as the others: where nothing is to be seen, nothing is to appear.

## Scores

Autoencoder, {scores["vae"]["frames"]} held-out frames: PSNR {scores["vae"]["psnr"]:.1f} dB. Where entities go is
measured by `tersor bench drag`; see the documentation.

## Training

`python recipes/tiny_drag.py --out OUT`, seed {lock["seed"]}: autoencoder {base["vae_steps"]:,} updates, UNet
{base["unet_steps"]:,} of {base["batch_size"]} clips without any control; in a second round, with the clips of one
colour, {second["unet_steps"]:,} more; then the branch
{branch["max_train_steps"]:,} of {branch["train_batch_size"]} clips beside the frozen UNet; {base["clips"]:,} clips.
{lock["minutes"]:.0f} minutes on
{lock["machine"]["threads"]} threads of {lock["machine"]["cpu"]}, beside other work. The data is drawn by the recipe.
"""

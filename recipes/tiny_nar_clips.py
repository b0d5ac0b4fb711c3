"""Clips for tiny-nar-video: a digit of MNIST, or a shape of strokes, that moves and bounces off the edges."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tiny_raster_data import SIDE, Split
from torch import Tensor

FRAMES = 8
#: Of the square that holds MNIST's digits, and of where it starts in the 28 pixels.
DIGIT, MARGIN = 20, 4
#: Directions in which a clip starts, as signs of rows and columns.
DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1))


@dataclass(frozen=True)
class Clips:
    """Pixels ``[n, 8, 1, 28, 28]`` from 0 to 1, digits ``[n]`` and directions ``[n]``."""

    pixels: Tensor
    digits: Tensor
    directions: Tensor


def moving(images: Tensor, labels: Tensor, *, seed: int) -> Clips:
    """A clip of each image ``[n, 1, 28, 28]``: it starts anywhere, and moves a pixel a frame both ways.

    A pure function of its arguments.
    """
    generator = torch.Generator().manual_seed(seed)
    room, n = SIDE - DIGIT, len(images)
    digits = images[..., MARGIN : MARGIN + DIGIT, MARGIN : MARGIN + DIGIT]
    directions = torch.randint(len(DIRECTIONS), (n,), generator=generator)
    signs = torch.tensor(DIRECTIONS)[directions]
    start = torch.randint(room + 1, (n, 2), generator=generator)
    pixels = torch.zeros(n, FRAMES, 1, SIDE, SIDE)
    rows = torch.arange(n)[:, None, None]
    for frame in range(FRAMES):
        # A triangle wave: what passes the edge by k is k before it.
        place = (start + frame * signs) % (2 * room)
        place = torch.where(place > room, 2 * room - place, place)
        down, right = (place[:, axis, None] + torch.arange(DIGIT) for axis in (0, 1))
        pixels[rows, frame, 0, down[:, :, None], right[:, None, :]] = digits[:, 0]
    return Clips(pixels, labels, directions)


def clips_of(split: Split, *, seed: int) -> tuple[Clips, Clips]:
    """Training and held-out clips, of the images of each."""
    return moving(split.train, split.train_labels, seed=seed), moving(
        split.held_out, split.held_out_labels, seed=seed + 1
    )

"""Clips for tiny-nar-video: a digit of MNIST, or a shape of strokes, that crosses the picture from corner to corner."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tiny_raster_data import SIDE, Split
from torch import Tensor

FRAMES = 8
#: Of the square that holds MNIST's digits, where it starts in the 28 pixels, and its side in a clip.
BOX, MARGIN, DIGIT = 20, 4, 14
#: Pixels a frame: the way from one corner to the other takes seven of them.
SPEED = 2
#: Ways to move, as signs of rows and columns.
DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1))


@dataclass(frozen=True)
class Clips:
    """Pixels ``[n, 8, 1, 28, 28]`` from 0 to 1, digits ``[n]`` and directions ``[n]``."""

    pixels: Tensor
    digits: Tensor
    directions: Tensor


def own_direction(digits: Tensor) -> Tensor:
    """The direction of a class: a digit has its way to move, as an action has."""
    return digits % len(DIRECTIONS)


def moving(images: Tensor, labels: Tensor, directions: Tensor) -> Clips:
    """A clip of each image ``[n, 1, 28, 28]``, which crosses the picture from a corner to the one across.

    Args:
        directions: indices ``[n]`` of `DIRECTIONS`.
    """
    digits = images[..., MARGIN : MARGIN + BOX, MARGIN : MARGIN + BOX]
    digits = F.interpolate(digits, (DIGIT, DIGIT), mode="bilinear", antialias=True).clamp(0, 1)
    signs = torch.tensor(DIRECTIONS)[directions]
    pixels = torch.zeros(len(images), FRAMES, 1, SIDE, SIDE)
    rows = torch.arange(len(images))[:, None, None]
    for frame in range(FRAMES):
        place = torch.where(signs > 0, frame * SPEED, SIDE - DIGIT - frame * SPEED)
        down, right = (place[:, axis, None] + torch.arange(DIGIT) for axis in (0, 1))
        pixels[rows, frame, 0, down[:, :, None], right[:, None, :]] = digits[:, 0]
    return Clips(pixels, labels, directions)


def clips_of(split: Split) -> tuple[Clips, Clips]:
    """Training and held-out clips, of the images of each; every digit moves in its own direction."""
    return moving(split.train, split.train_labels, own_direction(split.train_labels)), moving(
        split.held_out, split.held_out_labels, own_direction(split.held_out_labels)
    )


def judged_clips(split: Split, *, seed: int, count: int) -> Clips:
    """Clips that a classifier learns from, every digit in every direction, so that it sees one without the other."""
    directions = torch.randint(len(DIRECTIONS), (count,), generator=torch.Generator().manual_seed(seed))
    return moving(split.train[:count], split.train_labels[:count], directions)

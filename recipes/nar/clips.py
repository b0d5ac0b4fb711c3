"""Clips for tiny-nar-video: a digit of MNIST, or a shape of strokes, that moves down, to the left or both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from raster.data import SIDE, Split
from torch import Tensor

FRAMES = 8
#: The square that holds MNIST's digits: where it starts in the 28 pixels, and its side.
MARGIN, DIGIT = 4, 20
#: Ways to move, as pixels of rows and columns that a frame adds; all lead away from the top right corner, where NAR
#: starts. It draws the cells of a front without each other, and along a front, down and to the right, motion would have
#: to be guessed by each of them.
DIRECTIONS = ((1, 0), (0, -1), (1, -1))


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
    """A clip of each image ``[n, 1, 28, 28]``, whose digit moves from one side of the picture towards the other.

    Args:
        directions: indices ``[n]`` of `DIRECTIONS`.
    """
    digits = images[..., MARGIN : MARGIN + DIGIT, MARGIN : MARGIN + DIGIT]
    steps = torch.tensor(DIRECTIONS)[directions]
    # Along an axis without motion it stays in the middle.
    first = torch.tensor([SIDE - DIGIT, MARGIN, 0])[1 + steps]
    pixels = torch.zeros(len(images), FRAMES, 1, SIDE, SIDE)
    rows = torch.arange(len(images))[:, None, None]
    for frame in range(FRAMES):
        place = first + frame * steps
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

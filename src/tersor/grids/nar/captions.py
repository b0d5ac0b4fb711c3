"""Captions of digits, such as "a thick seven slanted left", made from what can be measured in the picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from tersor import _atomic
from tersor._errors import TersorError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STROKES = ("thin", "", "thick")
SLANTS = ("slanted left", "upright", "slanted right")
#: All words of captions.
WORDS = ("a", "thin", "thick", *DIGITS, "upright", "slanted", "left", "right")
#: Words of the longest caption.
LONGEST = 5
_FILE = "captions.json"


def thickness(images: Tensor) -> Tensor:
    """Ink over the length of its edge, ``[n]``, of images ``[n, 1, height, width]`` from 0 to 1."""
    down, right = images.diff(dim=-2), images.diff(dim=-1)
    edge = down.abs().sum((1, 2, 3)) + right.abs().sum((1, 2, 3))
    return images.sum((1, 2, 3)) / edge.clamp_min(1e-6)


def slant(images: Tensor) -> Tensor:
    """How far the ink moves to the right for each pixel that it rises, ``[n]``, by its second moments."""
    ink = images[:, 0]
    height, width = ink.shape[1:]
    total = ink.sum((1, 2)).clamp_min(1e-6)
    y = (
        torch.arange(height, dtype=ink.dtype)[:, None]
        - (ink.sum(2) @ torch.arange(height, dtype=ink.dtype) / total)[:, None, None]
    )
    x = (
        torch.arange(width, dtype=ink.dtype)
        - (ink.sum(1) @ torch.arange(width, dtype=ink.dtype) / total)[:, None, None]
    )
    return -(ink * x * y).sum((1, 2)) / (ink * y * y).sum((1, 2)).clamp_min(1e-6)


@dataclass(frozen=True)
class Captions:
    """Where thin ends and thick begins, and left and right: thirds of the training images.

    Args:
        strokes: The two borders of strokes.
        slants: The two borders of slants.
    """

    strokes: tuple[float, float]
    slants: tuple[float, float]

    @classmethod
    def fit(cls, images: Tensor) -> Captions:
        """The thirds of ``images``, ``[n, 1, height, width]``."""
        thirds = torch.tensor([1 / 3, 2 / 3])
        low, high = (torch.quantile(measure(images), thirds).tolist() for measure in (thickness, slant))
        return cls((low[0], low[1]), (high[0], high[1]))

    def classes(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Which of `STROKES` and of `SLANTS` each image is, ``[n]`` each."""
        return (
            torch.bucketize(thickness(images), torch.tensor(self.strokes)),
            torch.bucketize(slant(images), torch.tensor(self.slants)),
        )

    def save(self, folder: Path) -> None:
        """Write the borders into ``folder``."""
        _atomic.write_text(folder / _FILE, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Captions:
        """Read what `save` wrote; raises `ValueError` where there is nothing."""
        if not (folder / _FILE).is_file():
            raise TersorError(f"{folder} holds no {_FILE}: its model is of no captions")
        found = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        return cls(tuple(found["strokes"]), tuple(found["slants"]))


def caption(digit: int, stroke: int, side: int | None) -> str:
    """``caption(7, 2, 0)`` is "a thick seven slanted left"; stroke 1 and side None are not mentioned."""
    words = ["a", STROKES[stroke], DIGITS[digit], "" if side is None else SLANTS[side]]
    return " ".join(word for word in words if word)

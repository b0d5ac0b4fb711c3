"""Images for tiny-raster: all of MNIST, or strokes that are drawn here where nothing may be fetched."""

from __future__ import annotations

import hashlib
import io
import sys
import urllib.request
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tersor._lazy import require

SIDE = 28
ARCHIVE = "mnist_png.zip"
#: The public home of the archive; the images are under CC BY-SA 3.0, the repository under MIT.
URL = "https://github.com/rasbt/mnist-pngs/raw/main/mnist_png.zip"
#: The classes of `draw_strokes`: polylines in a unit square.
SHAPES = (
    ((0.1, 0.5, 0.9, 0.5),),
    ((0.5, 0.1, 0.5, 0.9),),
    ((0.15, 0.15, 0.85, 0.85),),
    ((0.15, 0.85, 0.85, 0.15),),
    ((0.1, 0.5, 0.9, 0.5), (0.5, 0.1, 0.5, 0.9)),
    ((0.15, 0.15, 0.85, 0.85), (0.15, 0.85, 0.85, 0.15)),
    ((0.15, 0.15, 0.85, 0.15, 0.85, 0.85, 0.15, 0.85, 0.15, 0.15),),
    ((0.5, 0.1, 0.9, 0.85, 0.1, 0.85, 0.5, 0.1),),
    ((0.1, 0.15, 0.9, 0.15), (0.5, 0.15, 0.5, 0.9)),
    ((0.15, 0.1, 0.15, 0.85, 0.85, 0.85),),
)


@dataclass(frozen=True)
class Split:
    """Images ``[n, 1, 28, 28]`` from 0 to 1 and their classes ``[n]``, for training and held out."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    source: str
    sha256: str | None


def load(data: str, *, seed: int, count: int | None, download: Path) -> Split:
    """The images that ``--data`` asks for, shuffled before the split: one in seven is held out.

    Args:
        data: a folder with `ARCHIVE`, which is fetched into ``download`` if it is "mnist"; or "procedural".
        count: use this many images only.

    Raises:
        ValueError: if there are no such images.
    """
    if data == "procedural":
        pixels, labels = draw_strokes(count or 70_000, seed=seed)
        source, digest = "strokes drawn by recipes/raster/data.py", None
    else:
        archive = fetch(download) if data == "mnist" else Path(data) / ARCHIVE
        if not archive.is_file():
            raise ValueError(f"--data {data}: no {ARCHIVE} in this folder; give 'mnist' to fetch it, or 'procedural'")
        pixels, labels, digest = read_archive(archive, count=count, seed=seed)
        source = "MNIST, all 70,000 images (rasbt/mnist-pngs; CC BY-SA 3.0)"
    # The file lists the images by class, and MNIST's own order has the cleaner ones first.
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    pixels, labels = pixels[order], labels[order]
    held = len(pixels) // 7
    return Split(pixels[held:], labels[held:], pixels[:held], labels[:held], source, digest)


def fetch(folder: Path) -> Path:
    """Download the archive into ``folder`` unless it is there."""
    target = folder / ARCHIVE
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"fetching {URL}", file=sys.stderr, flush=True)
        partial = target.with_suffix(".partial")
        urllib.request.urlretrieve(URL, partial)
        partial.replace(target)
    return target


def read_archive(archive: Path, *, count: int | None, seed: int) -> tuple[Tensor, Tensor, str]:
    """Pixels, labels and the file's sha256; ``count`` of the images, drawn with ``seed``, or all."""
    images = require("PIL.Image", "images")
    with zipfile.ZipFile(archive) as bundle:
        names = sorted(name for name in bundle.namelist() if name.endswith(".png"))
        if count is not None:
            names = [names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]]
        raw = np.stack([np.asarray(images.open(io.BytesIO(bundle.read(name))).convert("L")) for name in names])
    if raw.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"{archive} holds images of {raw.shape[1:]} pixels, not {(SIDE, SIDE)}")
    # train/<digit>/<number>.png
    labels = torch.tensor([int(name.split("/")[-2]) for name in names])
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return torch.from_numpy(raw).float().div_(255)[:, None], labels, digest


def draw_strokes(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Ten shapes of strokes with random place, size, slant and thickness, by distance to the nearest stroke."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(len(SHAPES), size=count)
    grid = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="xy"), -1).astype(np.float32) + 0.5
    pixels = np.zeros((count, SIDE, SIDE), np.float32)
    for index, label in enumerate(labels):
        size = generator.uniform(13, 19, 2)
        corner = generator.uniform(3, SIDE - 3 - size)
        slant, thickness = generator.uniform(-0.2, 0.2), generator.uniform(0.8, 1.9)
        distance = np.full((SIDE, SIDE), np.inf, np.float32)
        for line in SHAPES[label]:
            points = np.array(line, np.float32).reshape(-1, 2)
            points = points + np.stack([slant * (0.5 - points[:, 1]), np.zeros(len(points))], -1)
            points = corner + points * size
            for start, end in pairwise(points):
                distance = np.minimum(distance, _distance(grid, start, end))
        pixels[index] = np.clip(thickness + 0.5 - distance, 0, 1)
    return torch.from_numpy(pixels)[:, None], torch.from_numpy(labels)


def _distance(grid: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Of each pixel's centre to the segment."""
    along = end - start
    share = np.clip(((grid - start) @ along) / (along @ along), 0, 1)
    return np.linalg.norm(grid - (start + share[..., None] * along), axis=-1)


def source_facts(split: Split) -> dict[str, str | None]:
    """What a lock says of the data."""
    return {"data": split.source, "sha256": split.sha256}

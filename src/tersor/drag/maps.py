"""The two control maps of a video: what is where (entity map), and how near its centre (Gaussian map), section 3.3.

Maps are made a few frames at a time, because those of a whole video would be the largest thing in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tersor._errors import TersorError
from tersor.drag.scene import Scene

#: How maps are drawn: as the authors' code does, or by the formulas.
MAP_MODES = ("official", "exact")
#: Which numbers an entity's disc holds: its vector, or as in the authors' demo the vector's first number everywhere.
EMBEDDING_MODES = ("full", "demo_scalar")
#: In which order entities are drawn; later ones cover earlier ones.
ORDERS = ("radius", "given")
#: Largest radius in pixels at 320 rows, in the authors' demo.
MOST_RADIUS = 50.0
#: The authors' template: its side, and its standard deviation in pixels.
_SIDE, _SIGMA = 200, 40.0
#: Highest value of a Gaussian map.
PEAK = 255.0


@dataclass(frozen=True)
class Tracks:
    """A scene as maps see it: a disc for each entity and frame, in the order in which they are drawn.

    Args:
        width: Of the maps in pixels.
        height: Of the maps.
        centers: ``[entities, frames, 2]``, (x, y).
        radii: ``[entities]`` in pixels.
        numbers: Which entity of the scene each is.
    """

    width: int
    height: int
    centers: np.ndarray
    radii: tuple[int, ...]
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, scene: Scene, *, order: str = "radius", max_radius: float | None = None) -> Tracks:
        """The discs of a scene.

        Args:
            scene: On the size of the maps.
            order: One of `ORDERS`.
            max_radius: In pixels of a picture with 320 rows; None is no limit.
        """
        if order not in ORDERS:
            raise TersorError(f"order={order!r} must be one of {ORDERS}")
        most = float("inf") if max_radius is None else max_radius * scene.height / 320
        radii = [each.circle(most).radius for each in scene.entities]
        numbers = [*range(len(radii))]
        if order == "radius":
            numbers.sort(key=lambda number: -radii[number])
        centers = np.stack([scene.entities[number].centers(scene.num_frames) for number in numbers])
        return cls(scene.width, scene.height, centers, tuple(radii[number] for number in numbers), tuple(numbers))

    def only(self, numbers: Collection[int]) -> Tracks:
        """Those of some entities of the scene, drawn in the same order."""
        kept = [place for place, number in enumerate(self.numbers) if number in numbers]
        radii, own = (tuple(each[place] for place in kept) for each in (self.radii, self.numbers))
        return replace(self, centers=self.centers[kept], radii=radii, numbers=own)

    @property
    def num_frames(self) -> int:
        """Frames of the video."""
        return int(self.centers.shape[1])


def pooled_pairs(vectors: Tensor) -> Tensor:
    """Means of neighbouring channels, ``[entities, channels / 2]``: pooling vectors is pooling the maps of them."""
    return vectors.reshape(*vectors.shape[:-1], -1, 2).mean(-1)


def entity_vectors(vectors: Tensor, mode: str = "full") -> Tensor:
    """What is drawn into the discs, ``[entities, channels / 2]``, of entity features ``[entities, channels]``."""
    if mode not in EMBEDDING_MODES:
        raise TersorError(f"embedding_mode={mode!r} must be one of {EMBEDDING_MODES}")
    return pooled_pairs(vectors if mode == "full" else vectors[:, :1].expand_as(vectors))


def entity_maps(tracks: Tracks, vectors: Tensor, frames: range) -> Tensor:
    """Entity maps of some frames: each disc holds the vector of its entity, later ones cover earlier ones.

    Args:
        tracks: The discs.
        vectors: ``[entities, channels]`` in the order of the scene, see `entity_vectors`.
        frames: Which frames.

    Returns:
        ``[frames, channels, height, width]`` of the vectors' dtype and device.
    """
    maps = vectors.new_zeros(len(frames), vectors.shape[1], tracks.height, tracks.width)
    for place, frame in enumerate(frames):
        for entity, number in enumerate(tracks.numbers):
            inside = _squared_distance(tracks, entity, frame) <= tracks.radii[entity] ** 2
            maps[place, :, inside.to(maps.device)] = vectors[number][:, None]
    return maps


def gaussian_maps(tracks: Tracks, frames: range, mode: str = "exact") -> Tensor:
    """Gaussian maps of some frames, float32 ``[frames, 3, height, width]`` from 0 to 255.

    Args:
        tracks: The discs; the standard deviation of one is 0.4 of its radius.
        frames: Which frames.
        mode: One of `MAP_MODES`. The authors' code squeezes a template into what is in the frame of a disc's box, and
            later boxes cover earlier ones; the formula is cut at the border, and where discs meet the larger value
            stays.
    """
    if mode not in MAP_MODES:
        raise TersorError(f"map_mode={mode!r} must be one of {MAP_MODES}")
    maps = torch.zeros(len(frames), tracks.height, tracks.width)
    for place, frame in enumerate(frames):
        for entity, radius in enumerate(tracks.radii):
            if mode == "official":
                x, y = tracks.centers[entity, frame]
                _paste(maps[place], x, y, radius)
            elif radius:
                squared = _squared_distance(tracks, entity, frame)
                values = PEAK * torch.exp(-squared / (2 * (0.4 * radius) ** 2))
                maps[place] = torch.maximum(maps[place], values * (squared <= radius**2))
    return maps[:, None].expand(-1, 3, -1, -1).clone()


@cache
def template() -> Tensor:
    """The authors' Gaussian: 200 by 200, within the inscribed circle, in whole numbers up to 255."""
    squared = _grid_distance(_SIDE, _SIDE, _SIDE / 2, _SIDE / 2)
    values = (PEAK * torch.exp(-squared / (2 * _SIGMA**2))).floor()
    return values * (squared <= (_SIDE / 2) ** 2)


def _paste(into: Tensor, x: float, y: float, radius: int) -> None:
    height, width = into.shape
    left, right = (min(max(int(x) + sign * radius, 0), width) for sign in (-1, 1))
    top, bottom = (min(max(int(y) + sign * radius, 0), height) for sign in (-1, 1))
    if right - left <= 3 or bottom - top <= 3:
        return
    size = (bottom - top, right - left)
    resized = F.interpolate(template()[None, None], size, mode="bilinear", align_corners=False)
    into[top:bottom, left:right] = resized[0, 0].round()


def _squared_distance(tracks: Tracks, entity: int, frame: int) -> Tensor:
    x, y = tracks.centers[entity, frame]
    return _grid_distance(tracks.height, tracks.width, y, x)


def _grid_distance(height: int, width: int, row: float, column: float) -> Tensor:
    """Squared distances of pixels to a point, float32 ``[height, width]``."""
    rows, columns = torch.arange(height) - row, torch.arange(width) - column
    return (rows[:, None] ** 2 + columns[None, :] ** 2).float()


def chunks(num_frames: int, size: int) -> Sequence[range]:
    """Frames in runs of ``size``."""
    return [range(first, min(first + size, num_frames)) for first in range(0, num_frames, size)]

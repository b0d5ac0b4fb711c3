"""How well a video does what was asked: distances between tracks and paths, in pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tersor._errors import TersorError
from tersor.bench.frechet import Moments, frechet_distance

if TYPE_CHECKING:
    from torch import Tensor

#: What sees videos, such as I3D of whoever has its weights.
VideoFeatures = Callable[[np.ndarray], "Tensor"]


@dataclass(frozen=True)
class Motion:
    """Distances of tracked points to where they should be.

    Args:
        objmc_mean: Of all points and frames, the paper's ObjMC. Few lost tracks decide it.
        objmc_median: The same, by the median.
        objmc_visible: Of points that are in the frame and seen.
        objmc_norm: That, divided by the picture's diagonal.
        epe: End-point error as MoveBench has it (arXiv 2512.08765): over visible points, without the first frame.
        points: Points and frames that ``objmc_mean`` is over.
        seen: Of them, those that ``objmc_visible`` is over.
    """

    objmc_mean: float
    objmc_median: float
    objmc_visible: float
    objmc_norm: float
    epe: float
    points: int
    seen: int


def motion_error(
    found: np.ndarray, wanted: np.ndarray, size: tuple[int, int], visible: np.ndarray | None = None
) -> Motion:
    """Compare tracks of a video with those that were asked for.

    Args:
        found: ``[frames, points, 2]``, (x, y) in pixels.
        wanted: The same; the longer of the two is cut, as the authors' evaluation does.
        size: Width and height of the picture.
        visible: Bool ``[frames, points]``, where ``wanted`` is seen; None is wherever it is in the frame.

    Raises:
        TersorError: If the two have not as many points, or nothing is seen.
    """
    if found.ndim != 3 or wanted.ndim != 3 or found.shape[1:] != wanted.shape[1:]:
        raise TersorError(f"tracks must be [frames, points, 2] of as many points; got {found.shape} and {wanted.shape}")
    frames = min(len(found), len(wanted))
    distances: np.ndarray = np.linalg.norm(found[:frames] - wanted[:frames], axis=-1)
    inside = np.asarray(((wanted[:frames] >= 0) & (wanted[:frames] < np.array(size))).all(-1))
    seen: np.ndarray = inside if visible is None else inside & visible[:frames]
    if not seen[1:].any():
        raise TersorError("no point is seen after the first frame; there is nothing to measure")
    near = float(distances[seen].mean())
    return Motion(
        float(distances.mean()), float(np.median(distances)), near, near / float(np.hypot(*size)),
        float(distances[1:][seen[1:]].mean()), distances.size, int(seen.sum()),
    )  # fmt: skip


def static(points: np.ndarray, frames: int) -> np.ndarray:
    """Tracks of a video in which nothing moves, the row to stand beside every figure: ``[frames, points, 2]``."""
    return np.repeat(points[None], frames, axis=0)


def video_distance(real: np.ndarray, made: np.ndarray, network: VideoFeatures) -> float:
    """The Fréchet video distance (FVD, arXiv 1812.01717), by whichever network sees the videos.

    Figures of different networks, sizes or numbers of videos say nothing beside each other.

    Args:
        real: Float ``[videos, frames, height, width, 3]`` from 0 to 1.
        made: Likewise.
        network: Gives ``[videos, width]`` of such videos.

    Raises:
        TersorError: If a set has fewer than two videos.
    """
    return frechet_distance(Moments.of(network(real)), Moments.of(network(made)))

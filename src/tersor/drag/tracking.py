"""Point trackers: where points of the first frame are in the others."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from tersor._errors import TersorError
from tersor._lazy import require


class PointTracker(Protocol):
    """Follows points through a video."""

    def track(self, frames: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where points are.

        Args:
            frames: Float ``[frames, height, width, channels]`` from 0 to 1.
            points: ``[points, 2]``, (x, y) in the first frame.

        Returns:
            ``[frames, points, 2]``, and bool ``[frames, points]``, False where a point was lost.
        """


@dataclass(frozen=True)
class TemplateTracker:
    """Looks for the patch around a point near where it was, by the least squared difference, to a part of a pixel.

    It needs no weights and is meant for small clips of things that keep their looks; others are better on real videos.

    Args:
        radius: Pixels from a patch's middle to its border.
        search: Pixels that a patch may move from one frame to the next.
        lost: A patch that differs by more than this share of its own variance is lost.
    """

    radius: int = 3
    search: int = 6
    lost: float = 1.0

    def track(self, frames: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `PointTracker`."""
        check(frames, points)
        edge = self.radius + self.search
        padded = np.pad(frames.astype(np.float64), ((0, 0), (edge, edge), (edge, edge), (0, 0)), mode="edge")
        places, visible = np.empty((len(frames), len(points), 2)), np.ones((len(frames), len(points)), bool)
        for number, start in enumerate(points):
            column, row = (round(float(each)) for each in start)
            rest = start - (column, row)
            patch = self._cut(padded[0], row, column, self.radius)
            spread = max(float(patch.var()), 1e-6)
            places[0, number] = start
            for frame in range(1, len(frames)):
                row = min(max(row, 0), frames.shape[1] - 1)
                column = min(max(column, 0), frames.shape[2] - 1)
                costs = self._costs(self._cut(padded[frame], row, column, edge), patch)
                best = np.unravel_index(costs.argmin(), costs.shape)
                found = np.array([column, row]) + least_place(costs)
                visible[frame, number] = costs[best] <= self.lost * spread
                places[frame, number] = found + rest
                row, column = row + int(best[0]) - self.search, column + int(best[1]) - self.search
        return places, visible

    def _cut(self, frame: np.ndarray, row: int, column: int, radius: int) -> np.ndarray:
        """A square of a padded frame around a pixel."""
        middle = self.radius + self.search
        top, left = row + middle - radius, column + middle - radius
        return frame[top : top + 2 * radius + 1, left : left + 2 * radius + 1]

    def _costs(self, area: np.ndarray, patch: np.ndarray) -> np.ndarray:
        """Mean squared difference of the patch at each place, ``[2 search + 1, 2 search + 1]``."""
        windows = np.lib.stride_tricks.sliding_window_view(area, patch.shape[:2], axis=(0, 1))
        found: np.ndarray = ((windows - patch.transpose(2, 0, 1)) ** 2).mean((2, 3, 4))
        return found


def least_place(costs: np.ndarray) -> np.ndarray:
    """(x, y) from the middle of ``costs``, ``[odd, odd]``, to the least, by the quadratic through those around it."""
    row, column = (int(each) for each in np.unravel_index(costs.argmin(), costs.shape))
    whole = np.array([column - costs.shape[1] // 2, row - costs.shape[0] // 2], dtype=float)
    around = costs[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
    if around.shape != (3, 3):
        return whole
    (xx, xy, yy, x, y, _), *_ = np.linalg.lstsq(_QUADRATIC, around.ravel(), rcond=None)
    bend = np.array([[2 * xx, xy], [xy, 2 * yy]])
    if np.linalg.eigvalsh(bend).min() <= 1e-12:
        return whole
    moved: np.ndarray = whole + np.clip(np.linalg.solve(bend, [-x, -y]), -1.0, 1.0)
    return moved


_ROWS, _COLUMNS = (each.ravel().astype(float) for each in np.mgrid[-1:2, -1:2])
#: Terms of a quadratic in (x, y) at nine neighbours.
_QUADRATIC = np.stack([_COLUMNS**2, _COLUMNS * _ROWS, _ROWS**2, _COLUMNS, _ROWS, np.ones(9)], axis=1)


@dataclass(frozen=True)
class LucasKanadeTracker:
    """OpenCV's pyramids of Lucas and Kanade: quick, and right for what moves a little from frame to frame.

    Args:
        window: Side of the patch that is followed.
        levels: Halvings of the picture.

    Raises:
        MissingExtraError: Without OpenCV.
    """

    window: int = 15
    levels: int = 3

    def track(self, frames: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `PointTracker`."""
        cv2: Any = require("cv2", "tracking")
        check(frames, points)
        grey = [np.rint(255 * frame.mean(-1)).astype(np.uint8) for frame in frames]
        here = points.astype(np.float32)[:, None]
        places, seen = [points.astype(float)], [np.ones(len(points), bool)]
        for before, after in pairwise(grey):
            here, found, _ = cv2.calcOpticalFlowPyrLK(
                before, after, here, None, winSize=(self.window, self.window), maxLevel=self.levels
            )
            places.append(here[:, 0].astype(float))
            seen.append(seen[-1] & (found[:, 0] == 1))
        return np.stack(places), np.stack(seen)


@dataclass(frozen=True)
class CoTracker:
    """CoTracker (arXiv 2307.07635), which the user installs and loads: its licence forbids commercial use.

    Args:
        model: Such as ``torch.hub.load("facebookresearch/co-tracker", "cotracker3_offline")``.
    """

    model: Any

    def track(self, frames: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `PointTracker`."""
        import torch

        check(frames, points)
        parameter = next(self.model.parameters())
        video = torch.from_numpy(255 * frames).permute(0, 3, 1, 2)[None].to(parameter)
        # A query is the frame that its point lies in, and the point.
        queries = torch.from_numpy(np.concatenate([np.zeros((len(points), 1)), points], axis=1))[None].to(parameter)
        with torch.no_grad():
            found, seen = self.model(video, queries=queries)
        return found[0].double().cpu().numpy(), seen[0].bool().cpu().numpy()


def check(frames: np.ndarray, points: np.ndarray) -> None:
    """Raise `TersorError` unless these are a video and points, see `PointTracker.track`."""
    if frames.ndim != 4 or points.ndim != 2 or points.shape[1] != 2:
        raise TersorError(
            f"frames must be [frames, height, width, channels] and points [points, 2]; got {frames.shape} and "
            f"{points.shape}"
        )


#: Trackers that need no weights, by what ``--tracker`` calls them.
TRACKERS: dict[str, type[PointTracker]] = {"template": TemplateTracker, "lucas-kanade": LucasKanadeTracker}

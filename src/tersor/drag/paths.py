"""From a drawn path to a point for each frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tersor._errors import TersorError
from tersor._lazy import require

#: How the points of a path lie in time: evenly, or so that the speed along the path is the same everywhere.
TIMINGS = ("uniform", "uniform_speed")


def frame_points(path: np.ndarray, num_frames: int, timing: str | Sequence[float] = "uniform") -> np.ndarray:
    """Where a path is in each frame: monotone cubic interpolation (PCHIP) between its points.

    Args:
        path: ``[points, 2]``, (x, y) in pixels. A single point holds still, and as many points as frames are taken as
            they are, unless ``timing`` says otherwise.
        num_frames: Frames of the video.
        timing: One of `TIMINGS`, or the time of each point, rising from 0 to 1.

    Returns:
        ``[num_frames, 2]``, float64.

    Raises:
        TersorError: If the timing is none of these.
    """
    times = point_times(path, timing)
    if len(path) == 1:
        return np.repeat(path.astype(float), num_frames, axis=0)
    if len(path) == num_frames and isinstance(timing, str) and timing == "uniform":
        return path.astype(float)
    kept = np.concatenate([[True], np.diff(times) > 0])
    if kept.sum() == 1:  # all points are one
        return np.repeat(path[:1].astype(float), num_frames, axis=0)
    interpolate: Any = require("scipy.interpolate", "drag")
    curve = interpolate.PchipInterpolator(times[kept], path[kept].astype(float), axis=0)
    found: np.ndarray = curve(np.linspace(0.0, 1.0, num_frames) if num_frames > 1 else np.zeros(1))
    return found


def point_times(path: np.ndarray, timing: str | Sequence[float]) -> np.ndarray:
    """The time of each point of a path, from 0 to 1; arguments and errors as of `frame_points`."""
    count = len(path)
    if isinstance(timing, str):
        if timing not in TIMINGS:
            raise TersorError(f"timing={timing!r} must be one of {TIMINGS}, or a time for each point")
        if timing == "uniform" or count == 1:
            return np.linspace(0.0, 1.0, count) if count > 1 else np.zeros(1)
        lengths = np.concatenate([[0.0], np.linalg.norm(np.diff(path.astype(float), axis=0), axis=1).cumsum()])
        return lengths / lengths[-1] if lengths[-1] > 0 else lengths
    times = np.asarray(timing, dtype=float)
    rising = times.shape == (count,) and bool((np.diff(times) > 0).all()) and np.isfinite(times).all()
    if not rising or times[0] != 0.0 or (count > 1 and times[-1] != 1.0):
        raise TersorError(f"timing={list(timing)} must be {count} times that rise from 0 to 1, one for each point")
    return times

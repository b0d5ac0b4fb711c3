"""Where the layers of a sample went in a video, against where they were to go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tersor._lazy import require
from tersor.bench.measure import Estimate, bootstrap_difference
from tersor.drag.bench.world import FRAMES, MOST, SIDE, Sample
from tersor.drag.metrics import Motion, motion_error
from tersor.drag.tracking import least_place

#: Pixels that are searched to each side; a layer that was moved farther than any path is as wrong there.
_SEARCH = int(MOST) + 3
#: Pixels of a layer that are looked at, evenly spread.
_PIXELS = 128
#: Share of them that decide, the best ones: others may be hidden by what moved before them.
_DECIDING = 0.6


def motion_of(sample: Sample, frames: np.ndarray) -> Motion:
    """Distances between the layers of a video and their paths, over the frames in which half of a layer is seen.

    Args:
        sample: What was to be made.
        frames: The video, float ``[frames, side, side, 3]`` from 0 to 1.
    """
    found = [layer_track(sample.shown(number)[0], frames) for number in range(len(sample.layers))]
    shares = np.linspace(0.0, 1.0, FRAMES)[:, None]
    wanted = [shares * layer.motion for layer in sample.layers]
    areas = [sample.shown(number).sum((1, 2)) for number in range(len(sample.layers))]
    visible = np.stack([area >= 0.5 * area[0] for area in areas], axis=1)
    # As tracks of the frame's middle, which no path takes out of the frame.
    middle = np.full(2, SIDE / 2)
    return motion_error(np.stack(found, axis=1) + middle, np.stack(wanted, axis=1) + middle, (SIDE, SIDE), visible)


def error_taken_away(own: Sequence[float], other: Sequence[float]) -> Estimate:
    """Share of another row's error that one row does not make, over the same scenes."""
    less, whole = bootstrap_difference(other, own), float(np.mean(other))
    return Estimate(less.value / whole, less.low / whole, less.high / whole, less.interval)


def layer_track(mask: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """How far what is under a mask of the first frame has moved, ``[frames, 2]`` as (x, y), to a part of a pixel.

    In each frame every shift is tried, and the least mean squared difference of the pixels that fit best wins.
    """
    window: Any = require("numpy.lib.stride_tricks", "drag").sliding_window_view
    rows, columns = np.nonzero(mask)
    taken = np.unique(np.linspace(0, len(rows) - 1, _PIXELS).astype(int))
    rows, columns = rows[taken], columns[taken]
    known = frames[0][rows, columns]
    padded = np.pad(frames, ((0, 0), (_SEARCH, _SEARCH), (_SEARCH, _SEARCH), (0, 0)), constant_values=np.inf)
    places = []
    for frame in padded:
        shifted = window(frame, (2 * _SEARCH + 1, 2 * _SEARCH + 1), axis=(0, 1))[rows, columns]
        costs = ((shifted - known[..., None, None]) ** 2).mean(1)
        kept = max(1, round(_DECIDING * len(rows)))
        fitting = np.minimum(np.partition(costs, kept - 1, axis=0)[:kept].mean(0), 9.0)
        places.append(least_place(fitting))
    return np.stack(places)

"""Trackers find what was moved, and distances are what they are by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tersor._errors import TersorError
from tersor.drag.metrics import motion_error, static
from tersor.drag.tracking import TemplateTracker


def textured(frames: int = 5, step: tuple[float, float] = (2.0, 1.0), side: int = 48) -> np.ndarray:
    """A smooth texture that moves by ``step`` pixels a frame, sampled at parts of a pixel."""
    rng = np.random.default_rng(0)
    waves = [(rng.uniform(0.1, 0.9, 2), rng.uniform(0, 6.3)) for _ in range(12)]
    rows, columns = np.mgrid[:side, :side].astype(float)
    made = []
    for frame in range(frames):
        x, y = columns - step[0] * frame, rows - step[1] * frame
        made.append(sum(np.sin(a * x + b * y + phase) for (a, b), phase in waves) / 24 + 0.5)
    return np.stack(made)[..., None]


@pytest.mark.parametrize("step", [(0.0, 0.0), (2.0, 1.0), (-3.0, 2.0), (1.4, -0.6)])
def test_points_are_followed_to_a_part_of_a_pixel(step) -> None:
    points = np.array([[20.0, 18.0], [25.5, 24.25]])
    places, visible = TemplateTracker().track(textured(step=step), points)
    wanted = points + np.arange(5)[:, None, None] * np.array(step)
    assert np.abs(places - wanted).max() < 0.25 and visible.all()
    assert np.array_equal(places[0], points)


def test_a_point_whose_surroundings_are_gone_is_lost() -> None:
    frames = textured(step=(0.0, 0.0))
    frames[3:] = np.random.default_rng(1).random(frames[3:].shape)
    _, visible = TemplateTracker().track(frames, np.array([[20.0, 20.0]]))
    assert visible[:3].all() and not visible[3:].any()


def test_distances_are_by_hand() -> None:
    wanted = np.zeros((3, 2, 2)) + np.arange(3)[:, None, None] * np.array([[2.0, 0.0], [0.0, 4.0]]) + 1
    same = motion_error(wanted, wanted, (20, 20))
    assert same.objmc_mean == same.epe == same.objmc_median == 0 and same.points == same.seen == 6
    shifted = motion_error(wanted + np.array([3.0, 4.0]), wanted, (30, 40))
    assert shifted.objmc_mean == shifted.objmc_visible == shifted.epe == 5
    assert shifted.objmc_norm == pytest.approx(0.1)
    still = motion_error(static(wanted[0], 3), wanted, (20, 20))
    assert still.objmc_mean == pytest.approx((0 + 0 + 2 + 4 + 4 + 8) / 6) and still.epe == pytest.approx(18 / 4)
    assert still.objmc_median == pytest.approx(3)


def test_a_lost_track_decides_the_mean_and_not_the_rest() -> None:
    wanted = np.ones((4, 10, 2))
    found = wanted.copy()
    found[2, 0] = 10_001.0
    visible = np.ones((4, 10), bool)
    visible[2, 0] = False
    rows = motion_error(found, wanted, (20, 20), visible)
    assert rows.objmc_mean > 300 and rows.objmc_median == rows.objmc_visible == rows.epe == 0 and rows.seen == 39
    outside = wanted.copy()
    outside[1:, 3] = -5.0
    assert motion_error(wanted, outside, (20, 20)).seen == 37


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(TersorError, match="as many points"):
        motion_error(np.zeros((3, 2, 2)), np.zeros((3, 1, 2)), (8, 8))
    with pytest.raises(TersorError, match="no point is seen"):
        motion_error(np.zeros((3, 1, 2)), np.full((3, 1, 2), -1.0), (8, 8))
    assert motion_error(np.zeros((5, 1, 2)), np.zeros((3, 1, 2)), (8, 8)).points == 3, "the longer one is cut"
    with pytest.raises(TersorError, match="frames must be"):
        TemplateTracker().track(np.zeros((3, 8, 8)), np.zeros((1, 2)))

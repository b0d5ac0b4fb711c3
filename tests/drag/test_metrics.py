"""Trackers find what was moved, and distances are what they are by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tersor._errors import TersorError
from tersor.drag.metrics import motion_error, static, video_distance
from tersor.drag.tracking import CoTracker, LucasKanadeTracker, TemplateTracker, least_place


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


@pytest.mark.parametrize("step", [(0.0, 0.0), (2.0, 1.0), (1.4, -0.6)])
def test_lucas_and_kanade_follow_points_to_a_part_of_a_pixel(step) -> None:
    points = np.array([[20.0, 18.0], [25.5, 24.25]])
    places, visible = LucasKanadeTracker(window=11).track(textured(step=step), points)
    wanted = points + np.arange(5)[:, None, None] * np.array(step)
    assert np.abs(places - wanted).max() < 0.1 and visible.all()


def test_a_point_that_left_the_picture_stays_lost() -> None:
    _, visible = LucasKanadeTracker(window=11).track(textured(frames=8, step=(-4.0, 0.0)), np.array([[10.0, 20.0]]))
    assert visible[0].all() and not visible[-1].any()
    assert (np.diff(visible[:, 0].astype(int)) <= 0).all()


def test_cotracker_is_asked_as_it_wants_to_be() -> None:
    """Pixels from 0 to 255 with channels first, and queries of frame, x and y."""

    class Told(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, video: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert video.shape == (1, 5, 1, 48, 48) and 100 < video.max() <= 255
            assert queries.tolist() == [[[0.0, 20.0, 18.0]]]
            tracks = queries[:, None, :, 1:] + torch.arange(5.0)[None, :, None, None]
            return tracks, tracks[..., 0] < 23

    places, visible = CoTracker(Told()).track(textured(), np.array([[20.0, 18.0]]))
    assert places.shape == (5, 1, 2) and places[-1, 0].tolist() == [24.0, 22.0]
    assert visible[:, 0].tolist() == [True, True, True, False, False]


def test_the_least_place_of_a_quadratic_is_its_minimum() -> None:
    rows, columns = np.mgrid[-3:4, -3:4].astype(float)
    found = least_place((columns - 1.3) ** 2 + 2 * (rows + 0.4) ** 2 + 0.5 * (columns - 1.3) * (rows + 0.4))
    np.testing.assert_allclose(found, [1.3, -0.4], atol=1e-9)
    np.testing.assert_allclose(least_place(columns), [-3, -3])


def test_the_video_distance_is_that_of_what_a_network_sees() -> None:
    real = np.random.default_rng(0).random((40, 2, 4, 4, 3))

    def brightness(videos: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.stack([videos.mean((1, 2, 3, 4)), videos[:, 0].mean((1, 2, 3))], axis=1))

    assert video_distance(real, real, brightness) == pytest.approx(0, abs=1e-9)
    assert video_distance(real, real + 0.5, brightness) == pytest.approx(0.5)
    with pytest.raises(TersorError, match="at least 2 samples"):
        video_distance(real[:1], real, brightness)

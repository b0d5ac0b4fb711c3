"""The Fréchet distance against what it is by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tersor.bench.frechet import Moments, frechet_distance


def gaussian(mean: list[float], deviations: list[float]) -> Moments:
    return Moments(np.array(mean), np.diag(np.square(deviations)), 100)


def test_the_distance_of_gaussians_with_common_axes_is_that_of_means_and_deviations() -> None:
    """|m - n|^2 plus the squared differences of the standard deviations."""
    a, b = gaussian([1, 2, 0], [3, 1, 0]), gaussian([1, 0, 0], [1, 1, 2])
    assert frechet_distance(a, b) == pytest.approx(2**2 + 2**2 + 0 + 2**2)
    assert frechet_distance(b, a) == pytest.approx(12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_the_distance_does_not_depend_on_the_axes() -> None:
    generator = np.random.default_rng(0)
    turn, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    a, b = gaussian([1, 2, 0], [3, 1, 0.5]), gaussian([1, 0, 0], [1, 1, 2])
    turned = [Moments(turn @ each.mean, turn @ each.covariance @ turn.T, 100) for each in (a, b)]
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(a, b))


def test_moments_are_those_of_the_features() -> None:
    features = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
    moments = Moments.of(features)
    assert moments.mean == pytest.approx([2, 2])
    assert moments.covariance == pytest.approx(np.array([[4, 3], [3, 3]]))
    assert moments.n == 3
    with pytest.raises(ValueError, match="at least 2 samples"):
        Moments.of(features[:1])


def test_the_distance_of_gaussians_with_axes_of_their_own_is_that_worked_out_by_hand() -> None:
    """For two dimensions tr (A B)^1/2 is the root of tr A B + 2 (det A B)^1/2, whatever the axes."""
    a = Moments(np.zeros(2), np.array([[4.0, 0.0], [0.0, 1.0]]), 100)
    b = Moments(np.zeros(2), np.array([[2.0, 1.0], [1.0, 2.0]]), 100)
    assert not np.allclose(a.covariance @ b.covariance, b.covariance @ a.covariance)
    trace = (np.trace(a.covariance @ b.covariance) + 2 * (4.0 * 3.0) ** 0.5) ** 0.5
    assert frechet_distance(a, b) == pytest.approx(5 + 4 - 2 * trace)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b))

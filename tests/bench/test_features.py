"""The judge of generated images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tersor.bench.features import DigitClassifier, Moments, frechet_distance, load_judge, save_judge


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
    with pytest.raises(ValueError, match="at least 2 images"):
        Moments.of(features[:1])


def test_a_judge_survives_its_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = DigitClassifier()
    images = torch.rand(7, 1, 28, 28)
    features, guesses = classifier.judge(images, block=3)
    assert features.shape == (7, 64)
    assert torch.equal(guesses, classifier(images).argmax(-1))
    save_judge(tmp_path / "judge", classifier, Moments.of(features))
    loaded, reference = load_judge(tmp_path / "judge")
    assert torch.equal(loaded.judge(images, block=3)[0], features)
    assert not loaded.training
    assert frechet_distance(reference, Moments.of(features)) == pytest.approx(0, abs=1e-9)
    assert reference.n == 7
    with pytest.raises(ValueError, match="holds no classifier"):
        load_judge(tmp_path)

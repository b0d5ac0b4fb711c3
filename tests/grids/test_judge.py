"""The judge of generated images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tersor.bench.frechet import Moments, frechet_distance
from tersor.grids.judge import (
    FEATURES,
    ClipClassifier,
    DigitClassifier,
    Reference,
    load_judge,
    save_judge,
)


@pytest.fixture
def by_class() -> tuple[torch.Tensor, torch.Tensor]:
    """Features that lie around a place of their class, and the classes."""
    generator, labels = torch.Generator().manual_seed(0), torch.arange(400) % 10
    places = 5 * torch.randn(10, FEATURES, generator=generator)
    return places[labels] + torch.randn(400, FEATURES, generator=generator), labels


def test_the_distance_of_a_reference_is_that_of_the_features(by_class) -> None:
    features, labels = by_class
    expected = frechet_distance(Moments.of(features[:200] + 1), Moments.of(features))
    assert Reference.of(features, labels).distance(features[:200] + 1) == pytest.approx(expected)


def test_the_joint_distance_is_that_of_features_with_a_class_of_their_length(by_class) -> None:
    features, labels = by_class
    length = features.double().square().sum(-1).mean().sqrt()
    beside = [
        Moments.of(torch.cat([each, length * torch.nn.functional.one_hot(labels, 10)], dim=1))
        for each in (features, features + 1)
    ]
    found = Reference.of(features, labels).joint_distance(features + 1, labels)
    # The stored covariance divides by n - 1, the length here by n.
    assert found == pytest.approx(frechet_distance(*beside), rel=1e-3)


def test_only_the_joint_distance_sees_that_classes_are_mixed_up(by_class) -> None:
    features, labels = by_class
    reference, order = Reference.of(features, labels), torch.randperm(400, generator=torch.Generator().manual_seed(1))
    assert reference.distance(features[order]) == pytest.approx(0, abs=1e-6)
    assert reference.joint_distance(features[order], labels) > 100
    half = torch.cat([features[:200], features[200:][torch.randperm(200)]])
    assert 0 < reference.joint_distance(half, labels) < reference.joint_distance(features[order], labels)


def test_a_judge_survives_its_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = DigitClassifier()
    images = torch.rand(7, 1, 28, 28)
    features, guesses = classifier.judge(images, block=3)
    assert features.shape == (7, 64)
    assert torch.equal(guesses, classifier(images).argmax(-1))
    save_judge(tmp_path / "judge", classifier, Reference.of(features, guesses))
    loaded, reference = load_judge(tmp_path / "judge")
    assert torch.equal(loaded.judge(images, block=3)[0], features)
    assert not loaded.training
    assert reference.distance(features) == pytest.approx(0, abs=1e-6)
    assert reference.joint_distance(features, guesses) == pytest.approx(0, abs=1e-6)
    assert reference.joint.n == 7
    with pytest.raises(ValueError, match="holds no classifier"):
        load_judge(tmp_path)


def test_a_judge_of_clips_comes_back_as_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = ClipClassifier().eval()
    clips = torch.rand(9, 8, 1, 28, 28)
    features, guesses = judge.judge(clips)
    assert features.shape == (9, 64) and guesses.shape == (9,) and judge.direction(features).shape == (9, 3)
    save_judge(tmp_path, judge, Reference.of(features, guesses))
    again, reference = load_judge(tmp_path)
    assert isinstance(again, ClipClassifier) and reference.joint.n == 9
    assert torch.equal(again.judge(clips)[0], features)
    assert not torch.equal(judge.judge(clips.flip(1))[0], features), "it sees the order of frames"

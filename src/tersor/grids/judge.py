"""What generated images are judged by: a small classifier, its features, and Fréchet distances between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tersor._errors import TersorError
from tersor.bench.frechet import Moments, frechet_distance

_Floats = npt.NDArray[np.float64]
_WEIGHTS, _REFERENCE = "classifier.safetensors", "reference.safetensors"
#: Width of the features, which is the penultimate layer's, and the classes.
FEATURES, CLASSES = 64, 10


class DigitClassifier(nn.Module):
    """Ten classes of grey images of 28 by 28 pixels from 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 7 * 7, FEATURES)
        self.output = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """``[batch, FEATURES]`` of images ``[batch, 1, 28, 28]``."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[batch, 10]``."""
        logits: Tensor = self.output(self.features(images))
        return logits

    @torch.no_grad()
    def judge(self, images: Tensor, *, block: int = 500) -> tuple[Tensor, Tensor]:
        """Features ``[batch, FEATURES]`` and most likely classes ``[batch]``, ``block`` images at a time."""
        features = torch.cat([self.features(images[i : i + block]) for i in range(0, len(images), block)])
        return features, self.output(features).argmax(-1)


class ClipClassifier(DigitClassifier):
    """Digit and direction of grey clips of 8 frames of 28 by 28 pixels from 0 to 1; its features serve both."""

    FRAMES, DIRECTIONS = 8, 3

    def __init__(self) -> None:
        super().__init__()
        # What moves is a difference of frames, so they go side by side into the first layer.
        self.conv1 = nn.Conv2d(self.FRAMES, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 3 * 3, FEATURES)
        self.direction = nn.Linear(FEATURES, self.DIRECTIONS)

    def features(self, images: Tensor) -> Tensor:
        """``[batch, FEATURES]`` of clips ``[batch, 8, 1, 28, 28]``."""
        x = images.flatten(1, 2)
        for layer in (self.conv1, self.conv2, self.conv3):
            x = F.max_pool2d(F.relu(layer(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))


@dataclass(frozen=True)
class Reference:
    """Real samples as a classifier sees them.

    Args:
        joint: Moments of the features with the one-hot class beside them, ``[FEATURES + CLASSES]`` channels.
    """

    joint: Moments

    @classmethod
    def of(cls, features: Tensor, labels: Tensor) -> Reference:
        """Of features ``[n, FEATURES]`` and classes ``[n]``."""
        return cls(Moments.of(_beside(features, labels)))

    def distance(self, features: Tensor) -> float:
        """Fréchet distance of samples' features; it does not see whether they are of the class that was asked for."""
        return self._distance(Moments.of(F.pad(features, (0, CLASSES))), 0.0)

    def joint_distance(self, features: Tensor, labels: Tensor) -> float:
        """Fréchet joint distance (arXiv 1907.08175): of features with the class that was asked for beside them.

        As in the paper a class weighs as much as the features, whose length is the root of its mean square here.
        """
        of_features = self.joint.covariance.diagonal()[:FEATURES] + self.joint.mean[:FEATURES] ** 2
        return self._distance(Moments.of(_beside(features, labels)), float(np.sqrt(of_features.sum())))

    def _distance(self, found: Moments, weight: float) -> float:
        factors = np.repeat([1.0, weight], [FEATURES, CLASSES])
        return frechet_distance(found.scaled(factors), self.joint.scaled(factors))


def _beside(features: Tensor, labels: Tensor) -> Tensor:
    return torch.cat([features, F.one_hot(labels, CLASSES).to(features.dtype)], dim=1)


def save_judge(folder: Path, classifier: DigitClassifier, reference: Reference) -> None:
    """Write classifier and the real images' moments into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: each.contiguous() for name, each in classifier.state_dict().items()}
    save_file(weights, folder / _WEIGHTS)
    moments = {
        "mean": torch.from_numpy(reference.joint.mean),
        "covariance": torch.from_numpy(reference.joint.covariance),
        "n": torch.tensor(reference.joint.n),
    }
    save_file(moments, folder / _REFERENCE)


def load_judge(folder: Path) -> tuple[DigitClassifier, Reference]:
    """Read what `save_judge` wrote: classifier (eval mode) and reference; raises `ValueError` where there is none."""
    if not (folder / _WEIGHTS).is_file():
        raise TersorError(f"{folder} holds no classifier: there is no {_WEIGHTS}")
    weights = load_file(folder / _WEIGHTS)
    classifier = ClipClassifier() if "direction.weight" in weights else DigitClassifier()
    classifier.load_state_dict(weights)
    stored = load_file(folder / _REFERENCE)
    joint = Moments(stored["mean"].numpy(), stored["covariance"].numpy(), int(stored["n"]))
    return classifier.eval(), Reference(joint)

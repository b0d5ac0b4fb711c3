"""What generated samples are worth: judged one by one, and over the seeds of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.bench.measure import Estimate, PairedTimes, bootstrap_difference, bootstrap_interval, over_seeds
from tersor.grids.judge import DigitClassifier, Reference

#: A classifier, and what it sees in real samples.
Judge = tuple[DigitClassifier, Reference]


@dataclass(frozen=True)
class Samples:
    """What one seed of one decoding gave.

    Args:
        right: 1 for each sample that is taken for its class, else 0.
        distance: Fréchet distance of all samples to the real ones.
        joint: Fréchet joint distance, of samples with their classes.
        passes: Forward passes of each batch.
        fed: Tokens that each image of a batch took through the model; where it was counted.
        nats: Minus the logarithm of each sample's probability; where it was computed.
    """

    right: list[int]
    distance: float
    joint: float
    passes: list[int]
    fed: list[int] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)

    @classmethod
    def judged(cls, batches: Iterable[tuple[Tensor, Tensor, int]], judge: Judge) -> Samples:
        """Judge samples.

        Args:
            batches: Classes that were asked for ``[n]``, pixels of the samples, and forward passes of each batch.
            judge: Who judges.
        """
        classifier, reference = judge
        features, labels, right, passes = [], [], [], []
        for asked, pixels, count in batches:
            found, guesses = classifier.judge(pixels)
            features.append(found)
            labels.append(asked)
            right += (guesses == asked).int().tolist()
            passes.append(count)
        every = torch.cat(features)
        return cls(right, reference.distance(every), reference.joint_distance(every, torch.cat(labels)), passes)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Samples:
        """Samples of their fields, as a progress file keeps them."""
        return cls(**fields)


@dataclass(frozen=True)
class Quality:
    """One decoding over all seeds.

    Args:
        seeds: Samples of each.
    """

    seeds: list[Samples]

    @property
    def right(self) -> list[int]:
        """Of all seeds, in their order."""
        return [each for samples in self.seeds for each in samples.right]

    def accuracy(self) -> Estimate:
        """Share of samples that are taken for their class, with its 95 % bootstrap interval."""
        return bootstrap_interval(self.right, n_boot=2000)

    def against(self, other: Quality) -> Estimate:
        """Difference of accuracies; sample by sample, because both were asked for the same classes."""
        return bootstrap_difference(self.right, other.right, n_boot=2000)

    def distance(self) -> Estimate:
        """Mean Fréchet distance with its 95 % interval over seeds."""
        return over_seeds([each.distance for each in self.seeds])

    def joint(self) -> Estimate:
        """Mean Fréchet joint distance with its 95 % interval over seeds."""
        return over_seeds([each.joint for each in self.seeds])

    def passes(self) -> float:
        """Mean over batches."""
        return float(np.mean([each for samples in self.seeds for each in samples.passes]))

    def fed(self) -> float:
        """Mean over batches of the tokens that an image took through the model."""
        return float(np.mean([each for samples in self.seeds for each in samples.fed]))

    def nats(self) -> Estimate:
        """Mean minus log probability of a sample, with its 95 % bootstrap interval."""
        return bootstrap_interval([each for samples in self.seeds for each in samples.nats], n_boot=2000)


def rate(times: PairedTimes, name: str, samples: int = 1) -> Estimate:
    """Samples a second of what takes ``samples`` at once: the median with quartiles."""
    seconds = times.seconds(name)
    return Estimate(samples / seconds.value, samples / seconds.high, samples / seconds.low, seconds.interval)

"""The Fréchet distance between two sets of features, as FID and FVD have it (arXiv 1706.08500, 1812.01717)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tersor._errors import TersorError

if TYPE_CHECKING:
    from torch import Tensor

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Mean ``[width]`` and covariance ``[width, width]`` of ``n`` features, float64."""

    mean: _Floats
    covariance: _Floats
    n: int

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features ``[n, width]``; raises `ValueError` for fewer than two."""
        if features.ndim != 2 or len(features) < 2:
            raise TersorError(f"a covariance needs features [n, width] of at least 2 samples; got {features.shape}")
        values = features.double().numpy()
        return cls(values.mean(0), np.cov(values, rowvar=False), len(values))

    def scaled(self, factors: _Floats) -> Moments:
        """With each channel times its factor ``[width]``; one that has none left is left out."""
        kept = factors != 0
        mean, covariance = self.mean * factors, self.covariance * np.outer(factors, factors)
        return Moments(mean[kept], covariance[np.ix_(kept, kept)], self.n)


def frechet_distance(a: Moments, b: Moments) -> float:
    """``|m - n|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)``, the distance between the Gaussians of these moments.

    It is 0 for equal moments, and grows a little when they come from fewer images.
    """
    root = _square_root(a.covariance)
    # Similar to A B, so it has the same trace of the root, and symmetric, so its root is real.
    inner = _square_root(root @ b.covariance @ root)
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(inner))


def _square_root(matrix: _Floats) -> _Floats:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    root: _Floats = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root

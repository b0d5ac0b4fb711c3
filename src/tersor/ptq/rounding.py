"""Rounding up or down as calibration learns it, for comparison: AdaRound (arXiv 2004.10568)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tersor.ptq.layers import QuantLayer
from tersor.ptq.quantizers import rows, weight_limit

#: Of what is learned; with a few hundred iterations the published 1e-3 decides nothing.
ROUNDING_RATE = 1e-2
# The sigmoid is stretched beyond 0 and 1, so that it can arrive there (equation 23).
_LOW, _HIGH = -0.1, 1.1
# Factor of the regularizer, the share of iterations without it, and the exponent's first and last value.
_FACTOR, _FREE, _SOFT, _HARD = 0.01, 0.2, 20.0, 2.0


class LearnedRounding(QuantLayer):
    """A layer whose weights go to the integer below or above, by the sign of ``up``, in the shape of ``weight``."""

    def __init__(self, layer: Any, **settings: Any) -> None:
        super().__init__(layer, **settings)
        self.up = nn.Parameter(torch.zeros_like(self.weight))
        #: Whether to stand between the integers, which only a training step does.
        self.soft = False

    @torch.no_grad()
    def start(self) -> None:
        """Begin where the weights are, once their scales are known."""
        scaled = self.weight / rows(self.w_scale.abs(), self.weight)
        share = (scaled - scaled.floor() - _LOW) / (_HIGH - _LOW)
        self.up.copy_(torch.logit(share))

    def shares(self) -> Tensor:
        """From 0, the integer below, to 1, the one above."""
        return (torch.sigmoid(self.up) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def integers(self) -> Tensor:
        """The rounded weight; in a training step between two integers."""
        limit = weight_limit(self.weight_bits)
        below = (self.weight / rows(self.w_scale.abs(), self.weight)).floor().detach()
        return (below + (self.shares() if self.soft else (self.up >= 0).to(below))).clamp(-limit, limit)


def undecided(layers: Iterable[QuantLayer], progress: float) -> Tensor:
    """The regularizer of equation 24: what is between two integers costs, the more so towards the end.

    Args:
        progress: Share of the iterations that are done.
    """
    total = torch.zeros(())
    if progress < _FREE:
        return total
    exponent = _HARD + (_SOFT - _HARD) * (1 - (progress - _FREE) / (1 - _FREE))
    for layer in layers:
        if isinstance(layer, LearnedRounding):
            total = total + (1 - (2 * layer.shares() - 1).abs().pow(exponent)).sum()
    return _FACTOR * total

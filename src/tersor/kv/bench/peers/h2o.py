"""Heavy hitters (H2O, arXiv 2306.14048), on tersor's engine: accumulated attention of every row, per head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.kv.selection.base import Waiting
from tersor.kv.selection.ratio import Normalization, SaliencySelection, Scope


@dataclass(frozen=True, kw_only=True)
class HeavyHitterSelection(SaliencySelection):
    """Half of the budget goes to the newest tokens, the other half to those with the most accumulated attention."""

    probe_recent_ratio: float = 1.0
    probe_random_ratio: float = 0.0
    normalization: Normalization = "none"
    scope: Scope = "kv_head"

    def scores(self, waiting: Waiting) -> Tensor:
        lengths = waiting.lengths()[:, None]
        newest = waiting.places() >= lengths - (lengths * self.ratio / 2).long()
        return super().scores(waiting).masked_fill(newest[:, None, :], torch.inf)

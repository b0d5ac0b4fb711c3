"""The prompt's last queries choose for each head (SnapKV, arXiv 2404.14469), on tersor's engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.kv.selection.base import Waiting
from tersor.kv.selection.ratio import SaliencySelection, Scope


@dataclass(frozen=True, kw_only=True)
class SnapSelection(SaliencySelection):
    """Attention of the last ``window`` rows, its maximum over ``kernel`` neighbouring tokens; the window is kept.

    Where the budget is small, the window takes no more than half of it. Tokens that are generated later are not scored.
    """

    scope: Scope = "kv_head"
    window: int = 32
    kernel: int = 7

    def probe_rows(self, length: int, *, layer: int, segment: int) -> Tensor:
        return torch.arange(max(length - self.window, 0), length)

    def probes_step(self, step: int, gap: int, *, layer: int, segment: int) -> bool:
        return False

    def scores(self, waiting: Waiting) -> Tensor:
        scores = super().scores(waiting)
        pooled = torch.nn.functional.max_pool1d(scores, self.kernel, stride=1, padding=self.kernel // 2)
        lengths = waiting.lengths()[:, None]
        window = (lengths * self.ratio / 2).long().clamp_max(self.window)
        newest = waiting.places() >= lengths - window
        return pooled.masked_fill(newest[:, None, :], torch.inf)

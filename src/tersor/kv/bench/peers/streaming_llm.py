"""Attention sinks and a sliding window (StreamingLLM, arXiv 2309.17453), on tersor's engine.

Keys keep the position that they were read at, where the paper moves them into the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.kv.selection.base import Waiting
from tersor.kv.selection.ratio import RatioSelection


@dataclass(frozen=True, kw_only=True)
class SinkSelection(RatioSelection):
    """The first ``sinks`` tokens of the sequence and the newest ones."""

    sinks: int = 4

    def scores(self, waiting: Waiting) -> Tensor:
        places = waiting.places()
        ranks = places.float()
        if waiting.segment == 0:
            ranks = ranks.masked_fill(places < self.sinks, torch.inf)
        return ranks[:, None, :]

"""Keys and values in a narrower floating point: bfloat16, or the fp8 that serving engines offer (scale 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.kv.bench.peers.stored import Stored


@dataclass(frozen=True)
class Cast:
    """Tokens rounded to ``dtype``; what is beyond its range becomes its largest number."""

    dtype: torch.dtype

    def encode(self, tokens: Tensor) -> Stored:
        limit = torch.finfo(self.dtype).max
        return (tokens.clamp(-limit, limit).to(self.dtype),)

    def decode(self, stored: Stored, dim: int) -> Tensor:
        return stored[0].float()

"""How many bytes experts take, from configurations alone: the arithmetic behind the paper's ratios.

    expert = sum over linears of out * width(in, b)  +  2 E  +  2 k O  +  2 O  +  4 k L
    total  = 2 (N + E) + experts * expert (+ router)

with ``N`` weights of the ``L`` linears, ``O`` their outputs, ``E`` everything else, ``k`` salient channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tersor.experts.sources import Anatomy
from tersor.lowbit.packing import packed_width


@dataclass(frozen=True)
class ModelSize:
    """How many numbers a model holds."""

    linears: tuple[tuple[int, int], ...]
    """Outputs and inputs of each linear."""
    others: int
    """Numbers that are not in them."""

    @classmethod
    def of(cls, config: Any, architecture: type[nn.Module]) -> ModelSize:
        """Counted on the meta device: no weight is allocated."""
        anatomy = Anatomy.of(config, architecture)
        linears = tuple((shape[0], shape[1]) for shape in anatomy.linears.values())
        return cls(linears, sum(shape.numel() for shape in anatomy.others.values()))

    @property
    def linear_weights(self) -> int:
        """``N``."""
        return sum(out * dim for out, dim in self.linears)

    @property
    def outputs(self) -> int:
        """``O``."""
        return sum(out for out, _ in self.linears)

    @property
    def bytes_16(self) -> int:
        """The whole model in 16 bits."""
        return 2 * (self.linear_weights + self.others)

    def expert_bytes(self, *, bits: int, salient: int, others_changed: bool = True) -> int:
        """One expert's tensors, with steps and salient channels in 16 bits; exactly what its files hold."""
        codes = sum(out * packed_width(dim, bits) for out, dim in self.linears)
        kept = sum(2 * out * min(salient, dim) + 4 * min(salient, dim) for out, dim in self.linears)
        return codes + kept + 2 * self.outputs + (2 * self.others if others_changed else 0)

    def total_bytes(
        self, experts: int, *, bits: int, salient: int, router: int = 0, others_changed: bool = True
    ) -> int:
        """Base, experts and router together."""
        each = self.expert_bytes(bits=bits, salient=salient, others_changed=others_changed)
        return self.bytes_16 + experts * each + router

"""Which part of a cache gets how many bits: the least loss within a budget of bytes, in pure Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tersor._errors import TersorError


@dataclass(frozen=True)
class Cost:
    """What one part takes and loses at one width."""

    bytes: int
    loss: float


def choose_widths(parts: Sequence[Mapping[int, Cost]], budget: int) -> list[int]:
    """The width of each part with the least loss of all together; exact, part by part.

    Layers of one model have the same shapes, so that there are few different sums of bytes: of all ways to one sum,
    the one with the least loss is kept.

    Args:
        parts: Of each part, its cost by width; losses of parts add up, and bytes do.
        budget: Bytes of all parts together.

    Raises:
        ValueError: If the fewest bytes are more than the budget.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for costs in parts:
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for taken, (loss, widths) in best.items():
            for width, cost in costs.items():
                way = loss + cost.loss, (*widths, width)
                longer[taken + cost.bytes] = min(way, longer.get(taken + cost.bytes, way))
        best = longer
    within = [way for taken, way in best.items() if taken <= budget]
    if not within:
        raise TersorError(f"budget={budget} is below {min(best)} bytes, the fewest that the parts can take")
    return list(min(within)[1])

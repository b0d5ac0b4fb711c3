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
    """The width of each part: all begin with the fewest bytes, and what saves most loss a byte gets its bytes first.

    A part may go to any larger width at once, so that a width that helps little does not hide a larger one that does.

    Args:
        parts: Of each part, its cost by width; losses of parts add up, and bytes do.
        budget: Bytes of all parts together.

    Raises:
        ValueError: If the fewest bytes are more than the budget.
    """
    chosen = [min(costs, key=lambda width: costs[width].bytes) for costs in parts]
    left = budget - sum(costs[width].bytes for costs, width in zip(parts, chosen, strict=True))
    if left < 0:
        raise TersorError(f"budget={budget} is {-left} bytes below the fewest that the parts can take")
    while True:
        best, step = 0.0, None
        for index, costs in enumerate(parts):
            now = costs[chosen[index]]
            for width, cost in costs.items():
                more, saved = cost.bytes - now.bytes, now.loss - cost.loss
                if 0 < more <= left and saved > best * more:
                    best, step = saved / more, (index, width)
        if step is None:
            return chosen
        index, width = step
        left -= parts[index][width].bytes - parts[index][chosen[index]].bytes
        chosen[index] = width

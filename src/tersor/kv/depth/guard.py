"""Says when merging layers costs too much."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from tersor._errors import TersorError

#: Two layers of a model.
Pair = tuple[int, int]


class SimilarityGuard:
    """Says once, when every pair of a cache has merged its first segment, if merging costs too much.

    Args:
        pairs: The pairs of the cache.
        max_relative_error: Largest change of keys and values, as a share of their length, that nothing is said about.
        strict: Raise `ValueError` instead of warning.
    """

    def __init__(self, pairs: Sequence[Pair], max_relative_error: float, strict: bool):
        self.expected = set(pairs)
        self.max_relative_error = max_relative_error
        self.strict = strict
        self.rows: dict[Pair, dict[str, float]] = {}

    def note(self, pair: Pair, row: dict[str, float] | None) -> None:
        """Take the first figures of ``pair``, or None if it is not merged after all."""
        if pair not in self.expected:
            return
        self.expected.discard(pair)
        if row is not None:
            self.rows[pair] = row
        if not self.expected:
            self._judge()

    def _judge(self) -> None:
        worst = max((row["predicted_error"] for row in self.rows.values()), default=0.0)
        if worst <= self.max_relative_error:
            return
        message = (
            f"merging changes keys and values by up to {worst:.0%} of their length, more than "
            f"max_relative_error={self.max_relative_error}; pair fewer or other layers "
            "(MiniCache.auto(model, input_ids) picks them)\n" + pair_table(self.rows)
        )
        if self.strict:
            raise TersorError(message)
        warnings.warn(message, stacklevel=2)


def pair_table(rows: dict[Pair, dict[str, float]]) -> str:
    """One line for each pair of layers, for messages."""
    lines = ["layers  mean cosine  retained  predicted error"]
    for pair, row in sorted(rows.items()):
        name = f"{pair[0]}, {pair[1]}"
        figures = f"{row['mean_cosine']:>11.3f}{row['retained']:>10.1%}{row['predicted_error']:>17.3f}"
        lines.append(f"{name:<8}{figures}")
    return "\n".join(lines)

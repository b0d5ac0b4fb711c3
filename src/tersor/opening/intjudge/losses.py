"""What a judge may learn beside the words of its verdict: who wins, and the same in both orders.

OpenING (arXiv 2411.18499) names a ranking loss and says no more of it; these are the forms that are meant here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor.opening.records import Label

#: Label -> who wins, and how much a pair of it counts.
SIGNS: dict[Label, tuple[float, float]] = {
    "A": (1.0, 1.0),
    "B": (-1.0, 1.0),
    "Tie(A)": (1.0, 0.5),
    "Tie(B)": (-1.0, 0.5),
}


def margin(logits: Tensor, start: Tensor, first: tuple[int, int]) -> Tensor:
    """``s = log p("A is better") - log p("B is better")`` at the place of the verdict.

    Both words differ in their first token alone, and what follows it is taken for equally probable.

    Args:
        logits: ``[rows, places, vocabulary]``.
        start: ``[rows]`` int64, place of the logits that the verdict's first token is drawn from.
        first: First tokens of the two verdicts.

    Returns:
        ``[rows]`` float32.
    """
    said = logits[torch.arange(len(start), device=logits.device), start].float()
    return said[:, first[0]] - said[:, first[1]]


def ranking_loss(s: Tensor, sign: Tensor, weight: Tensor) -> Tensor:
    """``mean(w softplus(-y s))``.

    Args:
        s: ``[rows]``, see `margin`.
        sign: ``[rows]``, 1 where the answer that is shown first wins, -1 where it loses.
        weight: ``[rows]``, 1 for a win and one half for a lean.
    """
    return (weight * F.softplus(-sign * s)).mean()


def swap_loss(s: Tensor) -> Tensor:
    """``mean((s(A, B) + s(B, A))^2)``; rows ``2 i`` and ``2 i + 1`` are one pair in its two orders."""
    return (s[0::2] + s[1::2]).square().mean()

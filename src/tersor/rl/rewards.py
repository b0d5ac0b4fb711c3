"""Rewards and advantages of ZipR1 (arXiv 2504.18579, Eq. 9 and 10), without a trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tersor._errors import TersorError

Gate = Literal["group_any", "none"]
#: What is added to a standard deviation before it divides, as trl does.
EPSILON = 1e-4


@dataclass(frozen=True)
class Rewards:
    """The parts of Eq. (9); NaN where an answer could not be scored.

    Args:
        performance: ``r_per``, float64 ``[rollouts]``.
        efficiency: ``C * (1 - rho)``, likewise.
        gate: ``C``, 1 where some rollout of the group is right, likewise and never NaN.
        total: ``r_per + w_eff * C * (1 - rho)``, likewise.
    """

    performance: Tensor
    efficiency: Tensor
    gate: Tensor
    total: Tensor


def zipr1_rewards(
    performance: Tensor,
    token_ratio: Tensor,
    group_size: int,
    *,
    efficiency_weight: float = 1.0,
    gate: Gate = "group_any",
) -> Rewards:
    """Eq. (9): the answer's score, and what was saved wherever the question can be answered at all.

    Args:
        performance: Score of each answer, above 0.5 where it is right, ``[rollouts]``; NaN where it has none.
        token_ratio: Measured share of tokens in attention, ``[rollouts]``.
        group_size: Rollouts of a question; they stand next to each other.
        efficiency_weight: ``w_eff``.
        gate: ``"group_any"`` rewards efficiency where a rollout of the group is right, ``"none"`` everywhere.

    Raises:
        ValueError: If the rollouts are not whole groups.
    """
    right = _groups(performance.double(), group_size) > 0.5  # never true of NaN
    able = right.any(1, keepdim=True).double().expand_as(right).reshape(-1)
    opened = torch.ones_like(able) if gate == "none" else able
    scored = performance.double()
    efficiency = (opened * (1.0 - token_ratio.double())).masked_fill(scored.isnan(), torch.nan)
    return Rewards(scored, efficiency, opened, scored + efficiency_weight * efficiency)


def group_advantages(rewards: Tensor, group_size: int, *, scale: bool = True) -> Tensor:
    """Eq. (10): how much better each rollout is than its group, in standard deviations of the group.

    A group of equal rewards has advantages of zero. Rewards of NaN are left out of mean and deviation, and get zero.

    Args:
        rewards: ``[rollouts]``.
        group_size: Rollouts of a question; they stand next to each other.
        scale: Whether to divide by the (unbiased) standard deviation.

    Raises:
        ValueError: If the rollouts are not whole groups.
    """
    groups = _groups(rewards.double(), group_size)
    centred = groups - groups.nanmean(1, keepdim=True)
    if scale:
        known = (~groups.isnan()).sum(1, keepdim=True)
        deviation = (centred.square().nansum(1, keepdim=True) / (known - 1).clamp_min(1)).sqrt()
        centred = centred / (deviation + EPSILON)
    return centred.nan_to_num(0.0).reshape(-1)


def _groups(values: Tensor, size: int) -> Tensor:
    if size < 1 or values.ndim != 1 or len(values) % size:
        raise TersorError(f"{tuple(values.shape)} rollouts are no whole groups of {size}")
    return values.reshape(-1, size)

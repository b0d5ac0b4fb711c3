"""Rollouts at several thresholds: one question, read with attention that keeps more or less of it (section 2.2)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tersor._errors import TersorError

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from tersor.kv.session import Session


@dataclass(frozen=True)
class Rollouts:
    """What `multi_budget_generate` sampled.

    Args:
        completions: Ids of each answer with the token that ended it, where one did.
        logprobs: Log-probability of each of them under the sparse model at the sampling temperature, float32.
        thresholds: Threshold of each rollout, float64 ``[rollouts]``.
        token_ratio: Share of the prompt's tokens that took part in attention, mean over layers, ``[rollouts]``.
        visual_ratio: Likewise of visual tokens; NaN where there are none.
    """

    completions: list[list[int]]
    logprobs: list[list[float]]
    thresholds: Tensor
    token_ratio: Tensor
    visual_ratio: Tensor


def budgets(thresholds: Sequence[float], rows: int) -> Tensor:
    """The grid of thresholds again and again, one for each of ``rows`` rollouts, float64 ``[rows]``."""
    grid = torch.tensor(thresholds, dtype=torch.float64)
    return grid.repeat(-(-rows // len(grid)))[:rows]


@torch.no_grad()
def multi_budget_generate(
    session: Session, inputs: Mapping[str, Any], thresholds: Tensor, config: GenerationConfig
) -> Rollouts:
    """Answer every row with its own threshold: prefill, eviction and decoding.

    Args:
        session: An active session of the policy.
        inputs: What the processor returns, one row a rollout; rows of a question are repeated.
        thresholds: One a row, ``[rollouts]``; see `budgets`.
        config: How to sample. Beams are refused, one answer is drawn for each row.

    Raises:
        ValueError: For several answers a row or another number of thresholds.
    """
    if config.num_beams not in (None, 1) or config.num_return_sequences not in (None, 1):
        raise TersorError("rollouts are one sampled answer a row; leave num_beams and num_return_sequences at 1")
    rows, width = inputs["input_ids"].shape
    if len(thresholds) != rows:
        raise TersorError(f"{len(thresholds)} thresholds for {rows} rows; give one a row")
    config = copy.deepcopy(config)
    config.update(return_dict_in_generate=True, output_logits=True)
    with session.thresholds(thresholds):
        said: Any = session.model.generate(**inputs, generation_config=config)
    answers = said.sequences[:, width:]
    temperature = config.temperature if config.temperature is not None else 1.0
    logprobs = torch.stack(
        [
            (logits.float() / temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0]
            for logits, ids in zip(said.logits, answers.T, strict=True)
        ],
        dim=1,
    )
    ends = torch.tensor(_listed(config.eos_token_id), device=answers.device)
    over = torch.isin(answers, ends)
    lengths = torch.where(over.any(1), over.int().argmax(1) + 1, answers.shape[1]).tolist()
    stats = session.stats
    visual = stats.visual_per_row or [None] * rows
    return Rollouts(
        [row[:n].tolist() for row, n in zip(answers, lengths, strict=True)],
        [row[:n].tolist() for row, n in zip(logprobs, lengths, strict=True)],
        torch.as_tensor(thresholds, dtype=torch.float64),
        torch.tensor(stats.per_row, dtype=torch.float64),
        torch.tensor([torch.nan if each is None else each for each in visual], dtype=torch.float64),
    )


def _listed(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

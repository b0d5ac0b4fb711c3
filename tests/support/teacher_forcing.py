"""A forward over prompt and completion at once, and the same by decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tersor._compat import with_cache


def completion_of(ids: Tensor, tokens: int) -> Tensor:
    """The last ``tokens`` of every row."""
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, ids.shape[1] - tokens :] = True
    return mask


def by_decoding(net: PreTrainedModel, method: Any, inputs: dict[str, Tensor], tokens: int) -> tuple[Tensor, Any]:
    """Logits of the prompt and then of its last ``tokens``, one step each; and the cache."""
    ids, cache = inputs["input_ids"], method.cache(net.config)
    start = ids.shape[1] - tokens
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    first = {name: x[:, :start] if name in per_token else x for name, x in inputs.items()}
    logits = [net(**first, **with_cache(cache)).logits]
    padded = not bool(inputs.get("attention_mask", ids + 1).all())
    for i in range(start, ids.shape[1]):
        mask = {"attention_mask": inputs["attention_mask"][:, : i + 1]} if padded else {}
        logits.append(net(input_ids=ids[:, i : i + 1], **with_cache(cache), **mask).logits)
    return torch.cat(logits, 1), cache

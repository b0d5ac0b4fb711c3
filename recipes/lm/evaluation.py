"""Scores of tiny-lm: recall by task and context length, and bits per byte of held-out prose."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from tersor.kv.bench.tasks import TASKS, recall_samples


@torch.no_grad()
def recall_hits(
    model: LlamaForCausalLM, task: str, prose: str, *, n: int, seed: int, context_bytes: int, size: int = 16
) -> list[bool]:
    """Exact match per sample; greedy decoding is right iff every teacher-forced argmax of the answer is."""
    samples = recall_samples(task, n=n, prose=prose, seed=seed, context_bytes=context_bytes)
    texts = [s.context + s.question + s.answer_prefix + s.answer for s in samples]
    asked = len(samples[0].answer)
    hits: list[bool] = []
    for i in range(0, n, size):
        x = torch.tensor([list(t.encode("ascii")) for t in texts[i : i + size]])
        logits = model(input_ids=x, use_cache=False, logits_to_keep=asked + 1).logits[:, :-1]
        hits += (logits.argmax(-1) == x[:, -asked:]).all(dim=1).tolist()
    return hits


def recall_by_task(model: LlamaForCausalLM, prose: str, *, n: int, seed: int, context_bytes: int) -> dict[str, float]:
    """Share of exact matches per task."""
    return {
        task: float(np.mean(recall_hits(model, task, prose, n=n, seed=seed, context_bytes=context_bytes)))
        for task in TASKS
    }


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, prose: str, *, length: int = 1024, rows: int = 64, size: int = 8) -> float:
    """Mean bits per byte over `rows` windows of `length` bytes, spread evenly over the prose.

    Each window is read from a cold start, its first byte is not scored.
    """
    starts = np.linspace(0, len(prose) - length, rows).astype(int)
    nats = []
    for i in range(0, rows, size):
        x = torch.tensor([list(prose[s : s + length].encode("ascii")) for s in starts[i : i + size]])
        logits = model(input_ids=x[:, :-1], use_cache=False).logits
        nats.append(F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).item() * len(x))
    return sum(nats) / rows / math.log(2)

"""Quality of compressed caches on real text: recall of planted facts, quotations, and continuation loss.

The protocol is that of RULER and kvpress: the context is prefilled and compressed, then the rest of the prompt
and the answer are read in one forward that attends to the compressed cache. Greedy decoding gives the answer
exactly if every one of its bytes is the most likely one there, so nothing needs to be generated.

Every contender reads the same prefill: queries, keys and values of the context are recorded once (no method
here changes how a prompt attends) and replayed into each cache (`tersor.kv.tape`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from tersor._compat import with_cache
from tersor._errors import UnsupportedError
from tersor.bench.measure import Estimate, bootstrap_difference, bootstrap_interval
from tersor.bench.runs import Finished
from tersor.kv.bench.contenders import (
    Contender,
    bytes_at_half_precision,
    half_precision_dense,
    token_ids,
)
from tersor.kv.bench.tasks import PLANTED, RecallSample, recall_samples
from tersor.kv.tape import RECORDER, Tape, record, replay

Mode = Literal["aware", "agnostic"]
BATCH = 16


def recorded(model: PreTrainedModel, ids: Tensor) -> Tape:
    """`record`, for models that `half_precision_dense` can count.

    Raises:
        NotImplementedError: For models with layers that tersor does not compress.
    """
    tape = record(model, ids)
    if tape.others:
        raise UnsupportedError("only models whose layers all use full attention can be compared")
    return tape


@torch.inference_mode()
def answers_correct(model: PreTrainedModel, cache: Cache, prompt: Tensor, answer: Tensor) -> list[bool]:
    """Whether greedy decoding after ``prompt`` ``[batch, p]`` yields ``answer`` ``[batch, a]`` exactly."""
    logits = model(torch.cat([prompt, answer[:, :-1]], 1), **with_cache(cache)).logits
    predicted = logits[:, prompt.shape[1] - 1 :].argmax(-1)
    return [bool(right) for right in (predicted == answer).all(-1)]


@torch.inference_mode()
def continuation_loss(model: PreTrainedModel, cache: Cache, text: Tensor) -> list[float]:
    """Mean negative log-likelihood in nats of ``text`` ``[batch, tokens]``, its first token given."""
    logits = model(text[:, :-1], **with_cache(cache)).logits
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none")
    return [float(x) for x in loss.mean(-1)]


@dataclass
class Scores:
    """Per sample: 1.0 or 0.0 for recall, nats for continuation; and bytes of the compressed context."""

    values: list[float] = field(default_factory=list)
    cache_bytes: int = 0
    dense_bytes: int = 0

    @property
    def ratio(self) -> float:
        """Bytes of the dense 16-bit cache over bytes of this one."""
        return self.dense_bytes / self.cache_bytes

    def add(self, values: Sequence[float], cache_bytes: int, dense_bytes: int) -> None:
        self.values += [float(value) for value in values]
        self.cache_bytes += cache_bytes
        self.dense_bytes += dense_bytes

    def mean(self) -> Estimate:
        """Mean with its bootstrap interval."""
        return bootstrap_interval(self.values)

    def against(self, other: Scores) -> Estimate:
        """Mean difference to ``other`` on the same samples, with its paired bootstrap interval."""
        return bootstrap_difference(self.values, other.values)


def score_recall(
    model: PreTrainedModel,
    encode: Any,
    samples: Sequence[RecallSample],
    rivals: Sequence[Contender],
    *,
    mode: Mode = "agnostic",
) -> dict[str, Scores]:
    """Recall of every contender on ``samples`` of one task.

    Args:
        model: The model that is asked.
        encode: Maps text to ids.
        samples: The questions.
        rivals: The caches.
        mode: "aware" compresses context and question, "agnostic" the context alone.
    """
    scores = {rival.name: Scores() for rival in rivals}
    with RECORDER.on(model):
        for start in range(0, len(samples), BATCH):
            batch = samples[start : start + BATCH]
            context, prompt, answer = (
                token_ids(texts, encode) for texts in zip(*map(_split(mode), batch), strict=True)
            )
            tape = recorded(model, context)
            for rival in rivals:
                cache = replay(tape, rival.build(model.config))
                held = bytes_at_half_precision(cache)
                right = answers_correct(model, cache, prompt, answer)
                scores[rival.name].add(right, held, half_precision_dense(model.config, len(batch), tape.tokens))
    return scores


def _split(mode: Mode) -> Any:
    def parts(sample: RecallSample) -> tuple[str, str, str]:
        if mode == "aware":
            return sample.context + sample.question, sample.answer_prefix, sample.answer
        return sample.context, sample.question + sample.answer_prefix, sample.answer

    return parts


def score_continuation(
    model: PreTrainedModel,
    encode: Any,
    text: str,
    rivals: Sequence[Contender],
    *,
    n: int,
    prefix: int = 896,
    continuation: int = 128,
    seed: int = 0,
) -> dict[str, Scores]:
    """Loss of ``n`` continuations of real text when their prefix is read from each contender's cache."""
    scores = {rival.name: Scores() for rival in rivals}
    starts = np.random.default_rng([seed, 77]).integers(0, len(text) - prefix - continuation, size=n)
    windows = token_ids([text[s : s + prefix + continuation] for s in map(int, starts)], encode)
    with RECORDER.on(model):
        for start in range(0, n, BATCH):
            batch = windows[start : start + BATCH]
            # The last token of the prefix is read again with the continuation, whose first token it predicts.
            tape = recorded(model, batch[:, : prefix - 1])
            for rival in rivals:
                cache = replay(tape, rival.build(model.config))
                held = bytes_at_half_precision(cache)
                losses = continuation_loss(model, cache, batch[:, prefix - 1 :])
                scores[rival.name].add(losses, held, half_precision_dense(model.config, len(batch), tape.tokens))
    return scores


@dataclass(frozen=True)
class Plan:
    """What a benchmark run measures; two runs with equal plans measure the same samples."""

    model: str
    tasks: tuple[str, ...]
    samples: int
    mode: Mode
    seed: int
    context_bytes: int
    contenders: tuple[str, ...]
    continuations: int


def run_plan(
    plan: Plan, model: PreTrainedModel, encode: Any, text: str, rivals: Sequence[Contender], progress: Path | None
) -> Iterator[tuple[str, dict[str, Scores]]]:
    """Yield ``(task, scores by contender)``; finished tasks are kept in ``progress`` and not run again.

    The continuation loss comes last, as task ``"continuation"``.
    """
    finished = Finished(progress, plan, lambda kept: {name: Scores(**each) for name, each in kept.items()})

    def run(task: str) -> dict[str, Scores]:
        if task == "continuation":
            return score_continuation(model, encode, text, rivals, n=plan.continuations, seed=plan.seed)
        samples = recall_samples(task, n=plan.samples, prose=text, seed=plan.seed, context_bytes=plan.context_bytes)
        return score_recall(model, encode, samples, rivals, mode=plan.mode)

    for task in (*plan.tasks, *(("continuation",) if plan.continuations else ())):
        yield task, finished.once(task, partial(run, task))


def pooled(results: dict[str, dict[str, Scores]]) -> dict[str, Scores]:
    """Scores of every contender over all planted tasks together."""
    total: dict[str, Scores] = {}
    for task in PLANTED:
        for name, each in results.get(task, {}).items():
            total.setdefault(name, Scores()).add(each.values, each.cache_bytes, each.dense_bytes)
    return total

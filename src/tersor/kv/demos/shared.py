"""What the demos of KV methods share: questions about the book, records, the plot and the answers shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from tersor._compat import with_cache
from tersor.bench.plots import Point, plot_quality_vs_bytes
from tersor.bench.records import Record
from tersor.bench.report import Answer, Figure, Sample
from tersor.bench.runs import DEMO_SEED, OnProgress
from tersor.bench.verdicts import judge_points
from tersor.kv.bench.contenders import FULL, Contender
from tersor.kv.bench.recall import Scores, score_recall
from tersor.kv.bench.tasks import RecallSample, recall_samples
from tersor.kv.tape import RECORDER, record, replay

#: A point is lost for good when recall drops by more than this; ZipCache's paper loses 0.38 on GSM8K.
ALLOWED_LOSS = 0.5


def ask(
    model: PreTrainedModel,
    tokenizer: Any,
    book: str,
    tasks: Sequence[str],
    rivals: Sequence[Contender],
    *,
    samples: int,
    on_progress: OnProgress,
) -> tuple[dict[str, dict[str, Scores]], dict[str, list[RecallSample]]]:
    """``samples`` questions of each task about the book: scores by task and contender, and the questions."""
    results, questions = {}, {}
    for task in tasks:
        on_progress(f"{task.replace('_', ' ')}: {samples} questions about the book")
        questions[task] = recall_samples(task, n=samples, prose=book, seed=DEMO_SEED)
        results[task] = score_recall(model, tokenizer.encode, questions[task], rivals)
    return results, questions


def quality_records(
    make: Callable[..., Record],
    recall: dict[str, Scores],
    loss: dict[str, Scores],
    ours: str,
    *,
    item: str,
    accuracy: tuple[float, str],
    compression: tuple[float, str],
) -> list[Record]:
    """What ``ours`` loses in recall, takes in bytes and adds to the loss of a continuation, beside its strongest peer.

    Args:
        make: Makes the records.
        recall: Scores over planted facts, by cache.
        loss: Scores of continuations, by cache.
        ours: Name of the cache that the claims are about.
        item: The method and its settings.
        accuracy: Claimed difference in points, and its source.
        compression: Claimed compression, and its source.
    """
    peer, n = strongest_peer(recall, ours), len(recall[ours].values)
    difference = recall[ours].against(recall[FULL]) * 100
    peer_loss = 100 * recall[peer].against(recall[FULL]).value
    return [
        make(
            f"{item}: recall from book text", "accuracy against the full cache", "points", difference, n,
            claim=accuracy[0], claim_source=accuracy[1], baseline=0.0, peer=peer_loss, peer_name=peer,
            verdict=judge_points(difference, n, allowed=ALLOWED_LOSS, ahead=recall[ours].against(recall[peer])),
        ),
        make(
            "the same cache, every byte counted", "compression of a 16-bit cache", "x", recall[ours].ratio, n,
            claim=compression[0], claim_source=compression[1], baseline=1.0, peer=recall[peer].ratio, peer_name=peer,
        ),
        make(
            "continuation of the book", "loss against the full cache", "nats per byte", loss[ours].against(loss[FULL]),
            len(loss[ours].values), baseline=0.0, peer=loss[peer].against(loss[FULL]).value, peer_name=peer,
        ),
    ]  # fmt: skip


def strongest_peer(recall: dict[str, Scores], ours: str) -> str:
    """The alternative that recalls most among those that compress about as much as ``ours``, or more."""
    rivals = [name for name in recall if name not in (FULL, ours) and recall[name].ratio >= 0.95 * recall[ours].ratio]
    return max(rivals, key=lambda name: recall[name].mean().value)


def recall_plot(recall: dict[str, Scores], rivals: list[Contender]) -> Figure:
    """Recall of planted facts against compression, one point a cache."""
    points = []
    for rival in rivals:
        mean = recall[rival.name].mean() * 100
        points.append(Point(rival.name, recall[rival.name].ratio, mean.value, mean.low, mean.high, rival.family))
    svg = plot_quality_vs_bytes(
        points,
        x_label="compression of a 16-bit cache",
        y_label="questions answered exactly, %",
        description="Recall of facts planted in book text against compression of the KV cache, by method",
        baseline=100 * recall[FULL].mean().value,
    )
    return Figure(svg, "Recall against compression: up and to the right is better.")


def show_answers(model: PreTrainedModel, tokenizer: Any, sample: RecallSample, rivals: list[Contender]) -> Sample:
    """The answers that each method really writes to one question."""
    answers = []
    context, rest = tokenizer.encode(sample.context), tokenizer.encode(sample.question + sample.answer_prefix)
    with RECORDER.on(model), torch.inference_mode():
        tape = record(model, torch.tensor([context]))
        for rival in rivals:
            cache = replay(tape, rival.build(model.config))
            written = _greedy(model, cache, torch.tensor([rest]), len(sample.answer))
            text = tokenizer.decode(written)
            answers.append(Answer(rival.name, text, text == sample.answer))
    return Sample(
        title=sample.task.replace("_", " "),
        passage=sample.context,
        question=sample.question.strip() + sample.answer_prefix,
        expected=sample.answer,
        answers=answers,
    )


def _greedy(model: PreTrainedModel, cache: Any, ids: torch.Tensor, count: int) -> list[int]:
    written = []
    for _ in range(count):
        ids = model(ids, **with_cache(cache)).logits[:, -1:].argmax(-1)
        written.append(int(ids))
    return written

"""What the demos of KV methods share: questions about the book, records, the plot and the answers shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from tersor.bench.measure import Estimate, as_fields, machine, versions
from tersor.bench.plots import Point, plot_quality_vs_bytes
from tersor.bench.records import Record
from tersor.bench.report import Answer, Figure, Sample
from tersor.kv.bench.contenders import FULL, Contender
from tersor.kv.bench.recall import RECORDER, Scores, record, replay, score_recall
from tersor.kv.bench.tasks import RecallSample, recall_samples

SEED = 2024
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
    say: Callable[[str], None],
) -> tuple[dict[str, dict[str, Scores]], dict[str, list[RecallSample]]]:
    """``samples`` questions of each task about the book: scores by task and contender, and the questions."""
    results, questions = {}, {}
    for task in tasks:
        say(f"{task.replace('_', ' ')}: {samples} questions about the book")
        questions[task] = recall_samples(task, n=samples, prose=book, seed=SEED)
        results[task] = score_recall(model, tokenizer.encode, questions[task], rivals)
    return results, questions


def make_record(system: str, model: str, *, estimate: Estimate | float, **fields: Any) -> Record:
    """A record of ``tersor demo``; a plain number is exact and has no interval."""
    return Record(
        **{
            "system": system,
            **as_fields(estimate),
            "seed": SEED,
            "model": model,
            "shapes": "trained",
            "versions": versions(),
            "machine": machine(),
            "command": f"tersor demo --only {system}",
            "claim": None,
            "claim_source": None,
            "baseline": None,
            "peer": None,
            "peer_name": None,
            "verdict": None,
            **fields,
        }
    )


def bytes_and_loss_records(
    system: str,
    model: str,
    recall: dict[str, Scores],
    loss: dict[str, Scores],
    ours: str,
    peer: str,
    *,
    claim: float,
    claim_source: str,
) -> list[Record]:
    """What ``ours`` takes and adds to the loss of a continuation, beside ``peer``; the claim is about bytes."""
    return [
        make_record(
            system,
            model,
            item="the same cache, every byte counted",
            quantity="compression of a 16-bit cache",
            unit="x",
            claim=claim,
            claim_source=claim_source,
            estimate=recall[ours].ratio,
            baseline=1.0,
            peer=recall[peer].ratio,
            peer_name=peer,
            n=len(recall[ours].values),
        ),
        make_record(
            system,
            model,
            item="continuation of the book",
            quantity="loss against the full cache",
            unit="nats per byte",
            estimate=loss[ours].against(loss[FULL]),
            baseline=0.0,
            peer=loss[peer].against(loss[FULL]).value,
            peer_name=peer,
            n=len(loss[ours].values),
        ),
    ]


def strongest_peer(recall: dict[str, Scores], ours: str) -> str:
    """The alternative that recalls most among those that compress about as much as ``ours``, or more."""
    rivals = [name for name in recall if name not in (FULL, ours) and recall[name].ratio >= 0.95 * recall[ours].ratio]
    return max(rivals, key=lambda name: recall[name].mean().value)


def judge(difference: Estimate, peer_loss: float) -> str:
    """In points: "holds" if no more is lost than allowed and less than by the peer, "partly" if it still may be."""
    if difference.value >= -ALLOWED_LOSS and difference.value > peer_loss:
        return "holds"
    return "partly" if difference.high >= -ALLOWED_LOSS else "fails"


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """``estimate`` in a unit that is ``1 / factor`` times as large."""
    return Estimate(estimate.value * factor, estimate.low * factor, estimate.high * factor, estimate.interval)


def recall_plot(recall: dict[str, Scores], rivals: list[Contender]) -> Figure:
    """Recall of planted facts against compression, one point a cache."""
    points = []
    for rival in rivals:
        mean = scaled(recall[rival.name].mean(), 100)
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
        ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        written.append(int(ids))
    return written

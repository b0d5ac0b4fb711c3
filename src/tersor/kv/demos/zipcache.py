"""ZipCache on tiny-lm: questions about a real book, answered from a compressed cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from tersor import zoo
from tersor.bench.measure import time_paired
from tersor.bench.records import Record
from tersor.bench.report import Section
from tersor.bench.runs import DemoResult
from tersor.kv.bench.contenders import FULL, Contender, pick
from tersor.kv.bench.recall import RECORDER, Scores, pooled, record, replay, score_continuation
from tersor.kv.bench.tasks import TASKS
from tersor.kv.demos.shared import (
    SEED,
    ask,
    bytes_and_loss_records,
    judge,
    make_record,
    recall_plot,
    scaled,
    show_answers,
    strongest_peer,
)

MODEL = "tiny-lm"
OURS = "ZipCache 4/2 r=0.6"
EVICTION = "evict to 20% normalized"
SHOWN = (FULL, OURS, "uniform 4-bit", "uniform 2-bit", EVICTION, "evict to 20% recent", "QuantizedCache quanto 2-bit")
SHOWN_TASKS = ("needle", "multikey_needle", "quote")
SAMPLES_PER_TASK = 64
CONTINUATIONS = 64


def run(say: Callable[[str], None]) -> DemoResult:
    """Measure recall, continuation loss, bytes and time; ``say`` is told what is being done."""
    model, tokenizer = zoo.load(MODEL)
    book = zoo.book()
    rivals = pick(list(SHOWN))
    results, questions = ask(model, tokenizer, book, TASKS, rivals, samples=SAMPLES_PER_TASK, say=say)
    say(f"continuation of {CONTINUATIONS} passages of the book")
    loss = score_continuation(model, tokenizer.encode, book, rivals, n=CONTINUATIONS, seed=SEED)
    say("decoding time of full and compressed cache, in turns")
    seconds = _decode_times(model, tokenizer.encode(book[:1024]), rivals)
    recall = pooled(results)
    records = _records(recall, loss, seconds)
    section = Section(
        title="ZipCache: the KV cache in 4 and 2 bits",
        intro=(
            f"A byte-level language model reads 1,024 bytes of a book that it never saw in training, keeps them in a "
            f"compressed cache and answers {len(recall[FULL].values)} questions from it. Bars: 95% bootstrap intervals."
        ),
        figures=[recall_plot(recall, rivals)],
        samples=[
            show_answers(model, tokenizer, questions[task][0], rivals)
            for task in ("needle", "multikey_needle", "quote")
        ],
    )
    return DemoResult(records, section)


def _records(recall: dict[str, Scores], loss: dict[str, Scores], seconds: Any) -> list[Record]:
    full, ours = recall[FULL], recall[OURS]
    difference = scaled(ours.against(full), 100)
    peer = strongest_peer(recall, OURS)
    peer_loss = 100 * recall[peer].against(full).value
    return [
        make_record(
            "zipcache",
            MODEL,
            item="4/2 bits, 60% salient: recall from book text",
            quantity="accuracy against the full cache",
            unit="points",
            claim=-0.38,
            claim_source="GSM8K on Mistral-7B, 41.62 to 41.24 (arXiv 2405.14256)",
            estimate=difference,
            baseline=0.0,
            peer=peer_loss,
            peer_name=peer,
            n=len(ours.values),
            verdict=judge(difference, peer_loss),
        ),
        *bytes_and_loss_records(
            "zipcache",
            MODEL,
            recall,
            loss,
            OURS,
            peer,
            claim=4.98,
            claim_source="nominal, 16-bit parameters shared by the batch (arXiv 2405.14256)",
        ),
        make_record(
            "zipcache",
            MODEL,
            item="one decoding step at 1,024 bytes",
            quantity="time against the full cache",
            unit="x",
            estimate=seconds.ratio("ZipCache", "full"),
            baseline=1.0,
            n=len(seconds.samples["full"]),
        ),
    ]


def _decode_times(model: PreTrainedModel, context: list[int], rivals: list[Contender]) -> Any:
    """One step from a cache of the context, full and compressed in turns. Cropping puts the caches back."""
    ids = torch.tensor([context])
    built = {rival.name: rival.build(model.config) for rival in rivals if rival.name in (FULL, OURS)}
    with RECORDER.on(model), torch.inference_mode():
        tape = record(model, ids)
        for cache in built.values():
            replay(tape, cache)
        step = ids[:, -1:]

        def decode(name: str) -> None:
            model(step, past_key_values=built[name])
            built[name].crop(-1)

        functions = {"full": lambda: decode(FULL), "ZipCache": lambda: decode(OURS)}
        return time_paired(functions, repeats=30, warmup=3, seed=SEED)

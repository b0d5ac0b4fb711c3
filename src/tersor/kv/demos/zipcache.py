"""ZipCache on tiny-lm: questions about a real book, answered from a compressed cache."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from tersor import zoo
from tersor._compat import with_cache
from tersor._lazy import installed
from tersor.bench.measure import PairedTimes, time_paired
from tersor.bench.records import Record
from tersor.bench.report import Section
from tersor.bench.runs import DEMO_SEED, DemoResult, OnProgress, demo_records, drawn
from tersor.kv.bench.contenders import FULL, Contender, pick
from tersor.kv.bench.recall import Scores, pooled, score_continuation
from tersor.kv.bench.tasks import TASKS
from tersor.kv.demos.shared import ask, quality_records, recall_plot, show_answers
from tersor.kv.tape import RECORDER, record, replay

MODEL = "tiny-lm"
OURS = "ZipCache 4/2 r=0.6"
EVICTION = "evict to 20% normalized"
SHOWN = (FULL, OURS, "uniform 4-bit", "uniform 3-bit", "uniform 2-bit", EVICTION, "evict to 20% recent")
#: Compared as well where it is installed.
QUANTO = "QuantizedCache quanto 2-bit"
SHOWN_TASKS = ("needle", "multikey_needle", "quote")
SAMPLES_PER_TASK = 64
CONTINUATIONS = 64


def run(on_progress: OnProgress) -> DemoResult:
    """Measure recall, continuation loss, bytes and time; ``on_progress`` is told what is being done."""
    model, tokenizer = zoo.load(MODEL)
    book = zoo.book()
    rivals = pick([*SHOWN, QUANTO] if installed("optimum.quanto") else [*SHOWN])
    results, questions = ask(model, tokenizer, book, TASKS, rivals, samples=SAMPLES_PER_TASK, on_progress=on_progress)
    on_progress(f"continuation of {CONTINUATIONS} passages of the book")
    loss = score_continuation(model, tokenizer.encode, book, rivals, n=CONTINUATIONS, seed=DEMO_SEED)
    on_progress("decoding time of full and compressed cache, in turns")
    seconds = _decode_times(model, tokenizer.encode(book[:1024]), rivals)
    recall = pooled(results)
    records = _records(recall, loss, seconds)
    section = Section(
        title="ZipCache: the KV cache in 4 and 2 bits",
        intro=(
            f"A byte-level language model reads 1,024 bytes of a book that it never saw in training, keeps them in a "
            f"compressed cache and answers {len(recall[FULL].values)} questions from it. Bars: 95% bootstrap intervals."
        ),
        figures=drawn(lambda: recall_plot(recall, rivals)),
        samples=[show_answers(model, tokenizer, questions[task][0], rivals) for task in SHOWN_TASKS],
    )
    return DemoResult(records, section)


def _records(recall: dict[str, Scores], loss: dict[str, Scores], seconds: PairedTimes) -> list[Record]:
    make = demo_records("zipcache", MODEL)
    rows = quality_records(
        make, recall, loss, OURS,
        item="4/2 bits, 60% salient",
        accuracy=(-0.38, "GSM8K on Mistral-7B, 41.62 to 41.24 (arXiv 2405.14256)"),
        compression=(4.98, "nominal, 16-bit parameters shared by the batch (arXiv 2405.14256)"),
    )  # fmt: skip
    ratio, n = seconds.ratio("ZipCache", "full"), len(seconds.samples["full"])
    return [*rows, make("one decoding step at 1,024 bytes", "time against the full cache", "x", ratio, n, baseline=1.0)]


def _decode_times(model: PreTrainedModel, context: list[int], rivals: list[Contender]) -> PairedTimes:
    """One step from a cache of the context, full and compressed in turns. Cropping puts the caches back."""
    ids = torch.tensor([context])
    built = {rival.name: rival.build(model.config) for rival in rivals if rival.name in (FULL, OURS)}
    with RECORDER.on(model), torch.inference_mode():
        tape = record(model, ids)
        for cache in built.values():
            replay(tape, cache)
        step = ids[:, -1:]

        def decode(name: str) -> None:
            model(step, **with_cache(built[name]))
            built[name].crop(-1)

        functions = {"full": lambda: decode(FULL), "ZipCache": lambda: decode(OURS)}
        return time_paired(functions, repeats=30, warmup=3, seed=DEMO_SEED)

"""MiniCache on tiny-lm-tied: neighbouring layers share directions, in 4 bits and with ZipCache's 4/2."""

from __future__ import annotations

from tersor import zoo
from tersor.bench.records import Record
from tersor.bench.report import Section
from tersor.bench.runs import DEMO_SEED, DemoResult, OnProgress, demo_records, drawn
from tersor.kv.bench.contenders import FULL, Contender, pick
from tersor.kv.bench.recall import Scores, pooled, score_continuation
from tersor.kv.bench.tasks import PLANTED
from tersor.kv.compose import compose
from tersor.kv.demos.shared import ask, quality_records, recall_plot, show_answers
from tersor.kv.minicache import MiniCache
from tersor.kv.zipcache import ZipCache

MODEL = "tiny-lm-tied"
#: The pairs of this model that were trained to be similar; `MiniCache.auto` finds the same ones.
DEEP = ((2, 3), (4, 5), (6, 7))
OURS = "MiniCache 4-bit"
BOTH = "ZipCache + MiniCache"
RIVALS = ("uniform 4-bit", "uniform 2-bit", "ZipCache 4/2 r=0.6")
SAMPLES_PER_TASK = 64
CONTINUATIONS = 64


def rivals() -> list[Contender]:
    """The full cache, MiniCache alone and with ZipCache, and what saves bytes without merging."""
    merge = MiniCache(pairs=DEEP)
    return [
        *pick(list(RIVALS)),
        Contender(OURS, "MiniCache", merge.cache),
        Contender(BOTH, "both", compose(ZipCache(saliency_ratio=0.6), merge).cache),
    ]


def run(on_progress: OnProgress) -> DemoResult:
    """Measure recall, continuation loss and bytes; ``on_progress`` is told what is being done."""
    model, tokenizer = zoo.load(MODEL)
    book = zoo.book()
    shown = rivals()
    results, questions = ask(model, tokenizer, book, PLANTED, shown, samples=SAMPLES_PER_TASK, on_progress=on_progress)
    on_progress(f"continuation of {CONTINUATIONS} passages of the book")
    loss = score_continuation(model, tokenizer.encode, book, shown, n=CONTINUATIONS, seed=DEMO_SEED)
    recall = pooled(results)
    section = Section(
        title="MiniCache: neighbouring layers share one set of directions",
        intro=(
            "The model's layers 2 to 7 cache alike in pairs, as those of large models do from the middle on; a pair "
            "stores one direction a token and two lengths, in 4 bits or with ZipCache's 4/2. Merging saves at most a "
            "quarter of the bytes by itself."
        ),
        figures=drawn(lambda: recall_plot(recall, shown)),
        samples=[show_answers(model, tokenizer, questions["multikey_needle"][0], shown)],
    )
    return DemoResult(_records(recall, loss), section)


def _records(recall: dict[str, Scores], loss: dict[str, Scores]) -> list[Record]:
    make = demo_records("minicache", MODEL)
    both, n = recall[BOTH], len(recall[BOTH].values)
    return [
        *quality_records(
            make, recall, loss, OURS,
            item="three of four pairs merged, 4 bits",
            accuracy=(-0.97, "LongBench on Llama-2-7B-Chat, 36.41 to 35.44 (arXiv 2405.14366)"),
            compression=(
                5.02, "nominal: half of the layers merged, lengths and kept tokens not counted (arXiv 2405.14366)"
            ),
        ),
        make(
            "with ZipCache's 4/2 bits: recall from book text", "accuracy against the full cache", "points",
            both.against(recall[FULL]) * 100, n, baseline=0.0,
        ),
        make(
            "with ZipCache's 4/2 bits, every byte counted", "compression of a 16-bit cache", "x", both.ratio, n,
            baseline=1.0,
        ),
    ]  # fmt: skip

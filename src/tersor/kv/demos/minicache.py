"""MiniCache on tiny-lm-tied: neighbouring layers share directions, in 4 bits and with ZipCache's 4/2."""

from __future__ import annotations

from collections.abc import Callable

from tersor import zoo
from tersor.bench.records import Record
from tersor.bench.report import Section
from tersor.bench.runs import DemoResult
from tersor.kv.bench.contenders import FULL, Contender, pick
from tersor.kv.bench.recall import Scores, pooled, score_continuation
from tersor.kv.bench.tasks import PLANTED
from tersor.kv.compose import compose
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


def run(say: Callable[[str], None]) -> DemoResult:
    """Measure recall, continuation loss and bytes; ``say`` is told what is being done."""
    model, tokenizer = zoo.load(MODEL)
    book = zoo.book()
    shown = rivals()
    results, questions = ask(model, tokenizer, book, PLANTED, shown, samples=SAMPLES_PER_TASK, say=say)
    say(f"continuation of {CONTINUATIONS} passages of the book")
    loss = score_continuation(model, tokenizer.encode, book, shown, n=CONTINUATIONS, seed=SEED)
    recall = pooled(results)
    section = Section(
        title="MiniCache: neighbouring layers share one set of directions",
        intro=(
            "The model's layers 2 to 7 cache alike in pairs, as those of large models do from the middle on; a pair "
            "stores one direction a token and two lengths, in 4 bits or with ZipCache's 4/2. Merging saves at most a "
            "quarter of the bytes by itself."
        ),
        figures=[recall_plot(recall, shown)],
        samples=[show_answers(model, tokenizer, questions["multikey_needle"][0], shown)],
    )
    return DemoResult(_records(recall, loss), section)


def _records(recall: dict[str, Scores], loss: dict[str, Scores]) -> list[Record]:
    difference = scaled(recall[OURS].against(recall[FULL]), 100)
    peer = strongest_peer(recall, OURS)
    peer_loss = 100 * recall[peer].against(recall[FULL]).value
    return [
        make_record(
            "minicache",
            MODEL,
            item="three of four pairs merged, 4 bits: recall from book text",
            quantity="accuracy against the full cache",
            unit="points",
            claim=-0.97,
            claim_source="LongBench on Llama-2-7B-Chat, 36.41 to 35.44 (arXiv 2405.14366)",
            estimate=difference,
            baseline=0.0,
            peer=peer_loss,
            peer_name=peer,
            n=len(recall[OURS].values),
            verdict=judge(difference, peer_loss),
        ),
        *bytes_and_loss_records(
            "minicache",
            MODEL,
            recall,
            loss,
            OURS,
            peer,
            claim=5.02,
            claim_source="nominal: half of the layers merged, lengths and kept tokens not counted (arXiv 2405.14366)",
        ),
        make_record(
            "minicache",
            MODEL,
            item="with ZipCache's 4/2 bits: recall from book text",
            quantity="accuracy against the full cache",
            unit="points",
            estimate=scaled(recall[BOTH].against(recall[FULL]), 100),
            baseline=0.0,
            n=len(recall[BOTH].values),
        ),
        make_record(
            "minicache",
            MODEL,
            item="with ZipCache's 4/2 bits, every byte counted",
            quantity="compression of a 16-bit cache",
            unit="x",
            estimate=recall[BOTH].ratio,
            baseline=1.0,
            n=len(recall[BOTH].values),
        ),
    ]

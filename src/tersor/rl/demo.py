"""ZipR1 on tiny-vlm: the model before and after its training, at the same threshold of ZipVL."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from tersor import zoo
from tersor._compat import with_cache
from tersor.bench.measure import Estimate, PairedTimes, time_paired
from tersor.bench.records import Record
from tersor.bench.report import Figure, Section
from tersor.bench.runs import DEMO_SEED, DemoResult, OnProgress, demo_records, drawn
from tersor.bench.verdicts import FAILS, HOLDS, PARTLY, judge_points
from tersor.kv.bench.vision import (
    DENSE,
    Outcome,
    Task,
    accuracy,
    against,
    prompt,
    random_visual,
    run_method,
    tasks,
)
from tersor.kv.zipvl import ZipVL
from tersor.rl.figures import draw_frontiers, draw_layers

BEFORE, AFTER = "tiny-vlm", "tiny-vlm-zipr1"
TAU = 0.975
RANDOM = "random tokens"
#: Thresholds of the plot; 1 is dense attention.
TAUS = {BEFORE: (0.6, TAU, 1.0), AFTER: (0.9, TAU, 1.0)}
#: Cells on a side of a picture, as in the training.
GRID = 16
SAMPLES_PER_KIND = 40
ROUNDS = 7
#: Tokens decoded behind a prompt when a step is timed.
STEPS = 8
#: Points of accuracy that may be lost; the paper's model lost none against ZipVL before the training.
ALLOWED_LOSS = 1.0
#: Share of the tokens that a training must save to be one.
LEAST_SAVED = 0.1

Name = tuple[str, float | str]


def run(on_progress: OnProgress) -> DemoResult:
    """Measure accuracy, tokens and cost before and after; ``on_progress`` is told what is being done."""
    # In 16 bits, so that bytes are those of a real deployment.
    models = {name: zoo.load_model(name).to(torch.bfloat16) for name in TAUS}
    processor = zoo.load_processor(BEFORE)
    questions = tasks(SAMPLES_PER_KIND, seed=DEMO_SEED, grid=GRID)
    results: dict[Name, Outcome] = {}
    for name, taus in TAUS.items():
        for tau in taus:
            on_progress(f"{name} at tau={tau:g}: {len(questions)} pictures")
            recipe = ZipVL(tau=tau).method()
            choose = None if tau == 1.0 else lambda batch, recipe=recipe: recipe
            results[name, tau] = run_method(models[name], processor, questions, choose)
    on_progress(f"{AFTER}: as many random tokens")
    shares = results[AFTER, TAU].visual_ratios()
    results[AFTER, RANDOM] = run_method(
        models[AFTER], processor, questions, lambda batch: random_visual(shares, DEMO_SEED + batch)
    )
    on_progress("prefill and decoding, in turns")
    prefill, decoding = time_both(models, processor, questions[-1])
    section = Section(
        title="ZipR1: trained to need fewer tokens",
        intro=(
            f"The model of the ZipVL section was trained on with ZipR1's complete gradient, on pictures of {GRID**2} "
            f"visual tokens. Both run with ZipVL at tau={TAU:g}; the same threshold now needs fewer tokens."
        ),
        figures=drawn(lambda: _frontiers(results), lambda: _layers(results)),
    )
    return DemoResult(_records(results, prefill, decoding), section)


@torch.no_grad()
def time_both(models: dict[str, PreTrainedModel], processor: Any, task: Task) -> tuple[PairedTimes, PairedTimes]:
    """Prefills of one prompt, and steps behind it, of both models at `TAU` and of the first one densely, in turns."""
    inputs = prompt(processor, [task])
    token = inputs["input_ids"][:, -1:]
    methods = {name: ZipVL(tau=TAU).method() for name in models}
    caches: dict[str, Any] = {}

    def read(name: str) -> None:
        if name == DENSE:
            caches[name] = DynamicCache(config=models[BEFORE].config)
            models[BEFORE](**inputs, **with_cache(caches[name]), logits_to_keep=1)
            return
        caches[name] = methods[name].cache(models[name].config)
        with methods[name].on(models[name]):
            models[name](**inputs, **with_cache(caches[name]), logits_to_keep=1)

    def decode(name: str) -> None:
        model = models[BEFORE if name == DENSE else name]
        with nullcontext() if name == DENSE else methods[name].on(model):
            for _ in range(STEPS):
                model(input_ids=token, **with_cache(caches[name]), logits_to_keep=1)

    names = (DENSE, BEFORE, AFTER)
    prefill = time_paired({name: lambda name=name: read(name) for name in names}, repeats=ROUNDS)  # type: ignore[misc]
    decoding = time_paired({name: lambda name=name: decode(name) for name in names}, repeats=ROUNDS)  # type: ignore[misc]
    return prefill, decoding


def _frontiers(results: dict[Name, Outcome]) -> Figure:
    models = {
        name: [(results[name, tau].ratio, accuracy(results[name, tau])) for tau in taus] for name, taus in TAUS.items()
    }
    told = "; ".join(f"{name} at " + ", ".join(f"{tau:g}" for tau in taus) for name, taus in TAUS.items())
    return draw_frontiers(models, f"Each point is a threshold, to the left is cheaper: {told}, where 1 is dense.")


def _layers(results: dict[Name, Outcome]) -> Figure:
    models = {name: results[name, TAU].layer_ratios() for name in TAUS}
    return draw_layers(models, f"What each layer needs at tau={TAU:g}.")


def _records(results: dict[Name, Outcome], prefill: PairedTimes, decoding: PairedTimes) -> list[Record]:
    make = demo_records("zipr1", AFTER)
    before, after = results[BEFORE, TAU], results[AFTER, TAU]
    lost = against(after, before) * 100
    by_chance = 100 * against(results[AFTER, RANDOM], before).value
    densely = against(results[AFTER, 1.0], results[BEFORE, 1.0]) * 100
    n, same, points = len(after.first), f"tau={TAU:g}", ("accuracy against before the training", "points")
    return [
        make(
            f"{same}: {after.ratio:.1%} of the tokens instead of {before.ratio:.1%}", *points, lost, n,
            claim=0.7, claim_source="Qwen2.5-VL-7B, seven benchmarks, 72.9 to 73.6 (arXiv 2504.18579)", baseline=0.0,
            peer=by_chance, peer_name=f"{RANDOM}, as many a layer",
            verdict=judge(after.ratio / before.ratio, lost, against(after, results[AFTER, RANDOM], drawn=True), n),
        ),
        make(
            f"{same}: the same prompts", "tokens in attention", "share", after.ratio, n,
            claim=0.247, claim_source="Qwen2.5-VL-7B, from 0.795 (arXiv 2504.18579)", baseline=before.ratio,
        ),
        make("read densely", *points, densely, n, baseline=0.0),
        make(
            f"{same}: the same prompts", "attention operations saved", "share", after.flops / n, n,
            baseline=before.flops / n,
        ),
        make(
            f"{same}: the same prompts", "compression of a 16-bit cache", "x", after.dense_bytes / after.kv_bytes, n,
            baseline=before.dense_bytes / before.kv_bytes,
        ),
        *(
            make(f"{same}: {what}, one prompt", "speed-up against dense attention", "x", times.ratio(DENSE, AFTER),
                 ROUNDS, baseline=1.0, peer=times.ratio(DENSE, BEFORE).value, peer_name="before the training")
            for what, times in (("prefill", prefill), (f"{STEPS} decoding steps", decoding))
        ),
    ]  # fmt: skip


def judge(tokens: float, lost: Estimate, ahead: Estimate, n: int) -> str:
    """The verdict: `judge_at_least` on the accuracy where half of the tokens do, "partly" at best where more stay.

    Args:
        tokens: Tokens in attention against before the training.
        lost: Difference of accuracy, in points.
        ahead: How much more random tokens lose.
        n: Questions that were asked.
    """
    if tokens > 1 - LEAST_SAVED:
        return FAILS
    verdict = judge_points(lost, n, allowed=ALLOWED_LOSS, ahead=ahead)
    return PARTLY if verdict == HOLDS and tokens > 0.5 else verdict

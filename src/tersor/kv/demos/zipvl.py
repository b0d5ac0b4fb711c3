"""ZipVL on tiny-vlm: questions about tiles in a picture, answered from the tokens that each layer needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from tersor import zoo
from tersor.bench.plots import Point, plot_quality_vs_bytes
from tersor.bench.records import Record
from tersor.bench.report import Figure, Section
from tersor.bench.runs import DEMO_SEED, DemoResult, OnProgress, demo_records, drawn
from tersor.kv.bench.heatmap import heatmap, kept_cells
from tersor.kv.bench.peers.sparse import fastv
from tersor.kv.bench.vision import (
    DENSE,
    Outcome,
    Task,
    accuracy,
    against,
    prompt,
    random_visual,
    run_method,
    same_share,
    tasks,
)
from tersor.kv.demos.shared import judge
from tersor.kv.method import KVMethod
from tersor.kv.prefill.sparsity import SparsityStats
from tersor.kv.zipvl import ZipVL

MODEL = "tiny-vlm"
TAU = 0.975
PAPER, OURS = f"ZipVL {TAU:g}", f"ZipVL {TAU:g}, layer 0 dense"
STORED, RANDOM = f"{OURS}, quantize", "random tokens"
FIXED, ONCE = "fixed share a layer", "FastV-like, 50 %"
#: A row of the plot where less is kept than the defaults do.
LOWER = 0.6
SAMPLES_PER_KIND = 128


def run(on_progress: OnProgress) -> DemoResult:
    """Measure accuracy, tokens kept and bytes; ``on_progress`` is told what is being done."""
    # In 16 bits, so that bytes are those of a real deployment.
    model, processor = zoo.load_model(MODEL).to(torch.bfloat16), zoo.load_processor(MODEL)
    questions = tasks(SAMPLES_PER_KIND, seed=DEMO_SEED)
    results: dict[str, Outcome] = {}

    def measure(name: str, choose: Callable[[int], KVMethod] | None) -> None:
        on_progress(f"{name}: {len(questions)} pictures, two questions each")
        results[name] = run_method(model, processor, questions, choose)

    measure(DENSE, None)
    paper, once = ZipVL(tau=TAU, min_tokens=0).method(), fastv(0.5, min_tokens=0)
    measure(PAPER, lambda batch: paper)
    for tau in (TAU, LOWER):
        recipe = ZipVL(tau=tau, min_tokens=0, skip_layers=(0,)).method()
        ours, more = f"ZipVL {tau:g}, layer 0 dense", "" if tau == TAU else f", as ZipVL {tau:g}"
        measure(ours, lambda batch, recipe=recipe: recipe)  # type: ignore[misc]
        shares = results[ours].layer_ratios()
        measure(RANDOM + more, lambda batch, shares=shares: random_visual(shares, DEMO_SEED + batch))  # type: ignore[misc]
        fixed = same_share(shares, skip_layers=(0,))
        measure(FIXED + more, lambda batch, fixed=fixed: fixed)  # type: ignore[misc]
    stored = ZipVL(tau=TAU, min_tokens=0, policy="quantize", skip_layers=(0,)).method()
    measure(STORED, lambda batch: stored)
    measure(ONCE, lambda batch: once)
    section = Section(
        title="ZipVL: a prompt attends by the tokens that each layer needs",
        intro=(
            "A small Qwen2.5-VL looks at a picture of 256 cells, one visual token each, of which four are tiles and "
            "the rest is noise, and answers a question about the tiles. Every layer, or every layer but the first, "
            f"keeps the smallest set of tokens that holds {TAU:.1%} of its attention. Random tokens are visual ones, "
            "as many in each layer; text stays."
        ),
        figures=[
            *drawn(lambda: _accuracy_plot(results)),
            *(show_kept(model, processor, questions[0], tau) for tau in (TAU, LOWER)),
        ],
    )
    return DemoResult(_records(results), section)


def show_kept(model: PreTrainedModel, processor: Any, task: Task, tau: float) -> Figure:
    """The picture of one task, and what each layer kept of it."""
    with ZipVL(tau=tau, min_tokens=0).on(model) as session, torch.no_grad():
        inputs = prompt(processor, [task])
        model(**inputs)
        svg = draw_kept(session.stats, inputs, processor, task)
    asked = f"“{task.first.text}”, answer {task.first.answer}"
    return Figure(
        svg, f"What each layer keeps at tau={tau:g} for {asked}: dark cells are left out, outlined ones matter."
    )


def draw_kept(stats: SparsityStats, inputs: dict[str, torch.Tensor], processor: Any, task: Task) -> str:
    """SVG: the cells that each layer kept in the forward that ``stats`` belongs to."""
    first = int((inputs["input_ids"][0] == processor.image_token_id).nonzero()[0])
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    kept = [kept_cells(layer[0].tolist(), first=first, rows=rows, width=columns) for layer in stats.kept]
    labels = [f"layer {index}: {cells.mean():.0%} kept" for index, cells in enumerate(kept)]
    return heatmap(
        task.picture.pixels,
        kept,
        labels,
        description=f"Cells of a picture that each layer keeps for the question {task.first.text}",
        relevant=task.first.relevant,
    )


def _accuracy_plot(results: dict[str, Outcome]) -> Figure:
    points = []
    for name, each in results.items():
        right = accuracy(each) * 100
        family = name.partition(",")[0] if not name.startswith("ZipVL") else "ZipVL"
        points.append(Point(name, 1 / each.ratio, right.value, right.low, right.high, family))
    svg = plot_quality_vs_bytes(
        points,
        x_label="prompt tokens for each one in attention",
        y_label="questions answered right, %",
        description="Accuracy on questions about tiles against how many times fewer tokens take part in attention",
        baseline=100 * accuracy(results[DENSE]).value,
    )
    return Figure(svg, "Accuracy against sparsity: up and to the right is better.")


def _records(results: dict[str, Outcome]) -> list[Record]:
    make = demo_records("zipvl", MODEL)
    ours, dense, once = results[OURS], results[DENSE], results[ONCE]
    stored, n = results[STORED], len(ours.first)
    difference, paper = against(ours, dense) * 100, against(results[PAPER], dense) * 100
    peer = 100 * against(results[RANDOM], dense).value
    later = {turn: against(results[turn], dense, turn="second") * 100 for turn in (OURS, STORED)}
    accurate = "accuracy against dense attention", "points"
    claim = {"claim": -0.2, "claim_source": "Video-MME, LongVA-7B, 52.6 to 52.4 (arXiv 2410.08584v1)", "baseline": 0.0}
    return [
        make(
            f"tau={TAU}, first layer dense: questions about tiles", *accurate, difference, n,
            peer=peer, peer_name=f"{RANDOM}, as many a layer", verdict=judge(difference, peer), **claim,
        ),
        make(
            f"tau={TAU}, every layer sparse as in the paper", *accurate, paper, n,
            peer=difference.value, peer_name="first layer dense", verdict=judge(paper, peer), **claim,
        ),
        make(
            "first layer dense: the same prompts", "tokens in attention", "share", ours.ratio, n,
            claim=0.795, claim_source="Qwen2.5-VL-7B at the same tau, as reported by ZipR1",
            baseline=1.0, peer=once.ratio, peer_name=ONCE,
        ),
        make(
            "first layer dense: the same prompts", "attention operations saved", "share", ours.flops / n, n,
            baseline=0.0, peer=once.flops / n, peer_name=ONCE,
        ),
        make(
            "policy='quantize': 4 and 2 bits, every byte counted", "compression of a 16-bit cache", "x",
            stored.dense_bytes / stored.kv_bytes, n,
            baseline=1.0, peer=ours.dense_bytes / ours.kv_bytes, peer_name="policy='evict'",
        ),
        make(
            "policy='quantize': another question about the same picture", *accurate, later[STORED], n,
            baseline=0.0, peer=later[OURS].value, peer_name="policy='evict'",
        ),
    ]  # fmt: skip

"""ZipVL on tiny-vlm: questions that follow tiles in a picture, answered from the tokens that each layer needs."""

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
from tersor.bench.verdicts import judge_points
from tersor.kv.bench.heatmap import heatmap, kept_cells
from tersor.kv.bench.peers.sparse import fastv
from tersor.kv.bench.tiles import GRID
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
from tersor.kv.demos.shared import ALLOWED_LOSS
from tersor.kv.method import KVMethod
from tersor.kv.prefill.sparsity import SparsityStats
from tersor.kv.zipvl import ZipVL

MODEL = "tiny-vlm"
#: The paper's setting, and one where so little is kept that choices differ.
TAU, LOWER = 0.975, 0.4
PAPER, SPARSER, STORED = f"ZipVL {TAU:g}", f"ZipVL {LOWER:g}", f"ZipVL {TAU:g}, quantize"
RANDOM, FIXED, ONCE = "random tokens", "fixed share a layer", "FastV-like, 50 %"
SAMPLES_PER_KIND = 30


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
    for tau, ours in ((TAU, PAPER), (LOWER, SPARSER)):
        recipe, more = ZipVL(tau=tau).method(), "" if tau == TAU else f", as {ours}"
        measure(ours, lambda batch, recipe=recipe: recipe)  # type: ignore[misc]
        fixed, shares = same_share(results[ours].layer_ratios()), results[ours].visual_ratios()
        measure(FIXED + more, lambda batch, fixed=fixed: fixed)  # type: ignore[misc]
        measure(RANDOM + more, lambda batch, shares=shares: random_visual(shares, DEMO_SEED + batch))  # type: ignore[misc]
    stored, once = ZipVL(tau=TAU, policy="quantize").method(), fastv(0.5)
    measure(STORED, lambda batch: stored)
    measure(ONCE, lambda batch: once)
    section = Section(
        title="ZipVL: a prompt attends by the tokens that each layer needs",
        intro=(
            f"A small Qwen2.5-VL looks at a picture of {GRID**2:,} cells, one visual token each, of which eight are "
            f"tiles and the rest is noise, and follows one to three tiles to the answer. Every layer keeps the "
            f"smallest set of tokens that holds {TAU:.1%} of its attention, or {LOWER:.0%}. Random tokens are visual "
            "ones, as many in each layer; text stays. Where the model reads was taught, see its card."
        ),
        figures=[
            *drawn(lambda: _accuracy_plot(results)),
            *(show_kept(model, processor, questions[-1], tau) for tau in (TAU, LOWER)),
        ],
    )
    return DemoResult(_records(results), section)


def show_kept(model: PreTrainedModel, processor: Any, task: Task, tau: float) -> Figure:
    """The picture of one task, and what each layer kept of it."""
    with ZipVL(tau=tau).on(model) as session, torch.no_grad():
        inputs = prompt(processor, [task])
        model(**inputs)
        svg = draw_kept(session.stats, inputs, processor, task)
    asked = f"“{task.first.kind} {task.first.colour}”, answer {task.first.answer}"
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
        description=f"Cells of a picture that each layer keeps for {task.first.kind} {task.first.colour}",
        relevant=tuple(dict.fromkeys(task.first.steps)),
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
    ours, dense, once, stored = (results[name] for name in (PAPER, DENSE, ONCE, STORED))
    n, accurate = len(ours.first), ("accuracy against dense attention", "points")
    lost, sparser = (against(results[name], dense) * 100 for name in (PAPER, SPARSER))
    as_many = f"{FIXED}, as {SPARSER}"
    by_chance, fixed = (100 * against(results[name], dense).value for name in (RANDOM, as_many))
    later = {name: against(results[name], dense, turn="second") * 100 for name in (PAPER, STORED)}
    return [
        make(
            f"tau={TAU}, every layer sparse as in the paper", *accurate, lost, n,
            claim=-0.2, claim_source="Video-MME, LongVA-7B, 52.6 to 52.4 (arXiv 2410.08584v1)", baseline=0.0,
            peer=by_chance, peer_name=f"{RANDOM}, as many a layer",
            verdict=judge_points(lost, n, allowed=ALLOWED_LOSS, ahead=against(ours, results[RANDOM], drawn=True)),
        ),
        make(
            f"tau={LOWER}, every layer sparse: {results[SPARSER].ratio:.1%} of the tokens", *accurate, sparser, n,
            baseline=0.0, peer=fixed, peer_name=FIXED,
            verdict=judge_points(sparser, n, allowed=ALLOWED_LOSS, ahead=against(results[SPARSER], results[as_many])),
        ),
        make(
            f"tau={TAU}: the same prompts", "tokens in attention", "share", ours.ratio, n,
            claim=0.795, claim_source="Qwen2.5-VL-7B at the same tau, as reported by ZipR1",
            baseline=1.0, peer=once.ratio, peer_name=ONCE,
        ),
        make(
            f"tau={TAU}: the same prompts", "attention operations saved", "share", ours.flops / n, n,
            baseline=0.0, peer=once.flops / n, peer_name=ONCE,
        ),
        make(
            "policy='quantize': 4 and 2 bits, every byte counted", "compression of a 16-bit cache", "x",
            stored.dense_bytes / stored.kv_bytes, n,
            baseline=1.0, peer=ours.dense_bytes / ours.kv_bytes, peer_name="policy='evict'",
        ),
        make(
            "policy='quantize': another question about the same picture", *accurate, later[STORED], n,
            baseline=0.0, peer=later[PAPER].value, peer_name="policy='evict'",
        ),
    ]  # fmt: skip

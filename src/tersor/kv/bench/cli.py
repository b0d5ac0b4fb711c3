"""`tersor bench kv`, `quantizers`, `saliency` and `merging`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor.bench.runs import AsJson, Out, ResumableOut, cell, progress_file, record_maker, report_records, show
from tersor.zoo import loading

if TYPE_CHECKING:
    from tersor.bench.records import Record
    from tersor.kv.bench.recall import Scores


def bench_kv(
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub name or zoo name.")] = "tiny-lm",
    samples: Annotated[int, typer.Option(help="Questions a task.")] = 100,
    continuations: Annotated[int, typer.Option(help="Passages to continue; 0 leaves that part out.")] = 64,
    task: Annotated[list[str] | None, typer.Option(help="Run this recall task alone; may be repeated.")] = None,
    contender: Annotated[list[str] | None, typer.Option(help="Compare this cache alone; may be repeated.")] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Add the caches that users would pick instead.")] = False,
    mode: Annotated[str, typer.Option(help="'aware' compresses the question too, 'agnostic' does not.")] = "agnostic",
    text: Annotated[
        Path | None, typer.Option(help="Text to ask about; the embedded held-out book if left out.")
    ] = None,
    context_bytes: Annotated[int, typer.Option(help="Length of a context with its question.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the questions.")] = 1,
    out: ResumableOut = None,
    as_json: AsJson = False,
) -> None:
    """Compare KV caches on facts planted in a text (inserted, then asked for) and on loss, at their real bytes."""
    from tersor.kv.bench.tasks import TASKS

    if unknown := [name for name in task or () if name not in TASKS]:
        raise TersorError(f"--task {unknown} is unknown; choose from {list(TASKS)}")
    if mode not in ("aware", "agnostic"):
        raise TersorError(f"--mode {mode!r} must be 'aware' or 'agnostic'")
    if samples < 1 or continuations < 0:
        raise TersorError(f"--samples {samples} must be at least 1 and --continuations {continuations} at least 0")
    prose = _prose(text)
    location = loading.resolve(model)
    from tersor.kv.bench.contenders import pick
    from tersor.kv.bench.peers import unavailable
    from tersor.kv.bench.recall import Plan, pooled, run_plan

    rivals = pick(contender, with_peers=peers)
    names = tuple(each.name for each in rivals)
    plan = Plan(model, tuple(task or TASKS), samples, mode, seed, context_bytes, names, continuations)  # type: ignore[arg-type]
    network, tokenizer = loading.load(location, "cpu")
    results: dict[str, dict[str, Scores]] = {}
    with progress_file(out) as progress:
        with spinner() as status:
            status.update(f"{plan.tasks[0]} ...")
            for name, scores in run_plan(plan, network, tokenizer.encode, prose, rivals, progress):
                results[name] = scores
                status.update(f"{name} done")
        recall = pooled(results)
        overall = {"planted facts": recall} if recall else {}
        make = record_maker("kv", model=model, seed=seed)
        records = [
            row for name, scores in (overall | results).items() for row in _score_records(make, name, scores, mode)
        ]
        missing = unavailable() if peers else {}
        report_records(records, out, as_json, lambda: _print_bench(results, overall, missing))


def bench_quantizers(
    bits: Annotated[int, typer.Option(help="Bits of every number: 2, 4 or 8.")] = 4,
    passages: Annotated[int, typer.Option(help="Passages of the book to continue.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of passages and of the key bias.")] = 1,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Compare ways to store scale and offset of packed numbers, with outliers, key shift and key bias, on tiny-lm."""
    if bits not in (2, 4, 8):
        raise TersorError(f"--bits {bits} must be 2, 4 or 8")
    if passages < 1:
        raise TersorError(f"--passages {passages} must be at least 1")
    from tersor.kv.bench.layouts import score_layouts

    prose = _prose(None)
    network, tokenizer = loading.load(loading.resolve("tiny-lm"), "cpu")
    with spinner() as status:
        status.update(f"{passages} passages")
        scores = score_layouts(network, tokenizer.encode, prose, n=passages, bits=bits, seed=seed)
    records = _layout_records(scores, bits, seed)
    report_records(records, out, as_json, lambda: _print_layouts(scores))


def bench_saliency(
    samples: Annotated[int, typer.Option(help="Samples of 16 questions.")] = 500,
    contender: Annotated[list[str] | None, typer.Option(help="Compare this cache alone; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 1,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Compare saliency metrics on tiny-recall, where every fact is one token that is kept, rounded or gone."""
    if samples < 1:
        raise TersorError(f"--samples {samples} must be at least 1")
    from tersor import zoo
    from tersor.kv.bench.contenders import pick
    from tersor.kv.bench.pair_recall import score_pairs

    rivals = pick(contender, group_size=16)
    with spinner() as status:
        status.update(f"{samples} samples")
        scores = score_pairs(zoo.load_model("tiny-recall"), rivals, n=samples, seed=seed)
    records = _score_records(record_maker("kv", model="tiny-recall", seed=seed), "pair recall", scores)
    report_records(records, out, as_json, lambda: _print_bench({}, {"pair recall": scores}))


def bench_merging(
    model: Annotated[
        str, typer.Option(help="Checkpoint folder or zoo name, of layers alike in pairs.")
    ] = "tiny-lm-tied",
    compare: Annotated[str, typer.Option(help="'pairs': ways to merge; 'bytes': with and beside ZipCache.")] = "pairs",
    samples: Annotated[int, typer.Option(help="Questions a task.")] = 50,
    continuations: Annotated[int, typer.Option(help="Passages to continue.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of questions and passages.")] = 1,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Merge ever more pairs of layers, deepest first, or compare merging with fewer bits at equal bytes.

    'pairs' merges by MiniCache, with and without retention, and by plain averaging. 'bytes' merges all but the first.
    The later layer of each pair caches vectors of twice the length, as layers of real models differ; the output is the
    same.
    """
    if compare not in ("pairs", "bytes"):
        raise TersorError(f"--compare {compare!r} must be 'pairs' or 'bytes'")
    if samples < 1 or continuations < 1:
        raise TersorError(f"--samples {samples} and --continuations {continuations} must be at least 1")
    location = loading.resolve(model)
    from tersor.kv.bench.contenders import FULL
    from tersor.kv.bench.merging_curves import merging_contenders, stacked_contenders, with_longer_layers
    from tersor.kv.bench.recall import pooled, score_continuation, score_recall
    from tersor.kv.bench.tasks import PLANTED, recall_samples

    network, tokenizer = loading.load(location, "cpu")
    prose = _prose(None)
    layers = network.config.num_hidden_layers
    network = with_longer_layers(network, range(3, layers, 2))
    pairs = [(first, first + 1) for first in range(0, layers - 1, 2)]
    rivals = merging_contenders(pairs) if compare == "pairs" else stacked_contenders(pairs[1:])
    results: dict[str, dict[str, Scores]] = {}
    with spinner() as status:
        for task in PLANTED:
            status.update(task)
            questions = recall_samples(task, n=samples, prose=prose, seed=seed)
            results[task] = score_recall(network, tokenizer.encode, questions, rivals)
        status.update("continuation")
        loss = score_continuation(network, tokenizer.encode, prose, rivals, n=continuations, seed=seed)
    recall = pooled(results)
    make = record_maker("kv", model=model, seed=seed)
    records = _score_records(make, "planted facts", recall) + _score_records(make, "continuation", loss)
    records += [
        make(
            f"{name}: added loss", "loss against the full cache", "nats per byte", each.against(loss[FULL]),
            len(each.values), baseline=0.0,
        )
        for name, each in loss.items()
    ]  # fmt: skip
    report_records(records, out, as_json, lambda: _print_bench({"continuation": loss}, {"planted facts": recall}))


def _layout_records(scores: dict[str, dict[str, Scores]], bits: int, seed: int) -> list[Record]:
    """Loss added by each layout under each stress."""
    make = record_maker("kv", model="tiny-lm", seed=seed)
    return [
        make(
            f"{layout}, {bits}-bit: {stress}", "loss against the exact cache", "nats per byte",
            each.against(by_layout["exact"]), len(each.values), baseline=0.0,
        )
        for stress, by_layout in scores.items()
        for layout, each in by_layout.items()
        if layout != "exact"
    ]  # fmt: skip


def _print_layouts(scores: dict[str, dict[str, Scores]]) -> None:
    rows = [
        [layout, *(f"{by_layout[layout].mean().value:.4f}" for by_layout in scores.values())]
        for layout in next(iter(scores.values()))
    ]
    show(["layout", *scores], rows, title="continuation loss, nats per byte")


def _prose(file: Path | None) -> str:
    from tersor import zoo
    from tersor.kv.bench.tasks import ascii_fold

    if file is None:
        return ascii_fold(zoo.book())
    if not file.is_file():
        raise TersorError(f"--text {file}: no such file")
    return ascii_fold(file.read_text(encoding="utf-8", errors="replace"))


def _score_records(
    make: Callable[..., Record], task: str, scores: dict[str, Scores], mode: str = "agnostic"
) -> list[Record]:
    """Two records a cache, quality and compression; ``mode`` is that of a recall task."""
    from tersor.kv.bench.contenders import FULL

    quantity, unit = ("loss", "nats per byte") if task == "continuation" else (f"recall, {mode}", "share")
    if task == "pair recall":
        quantity = "recall"
    records = []
    for name, each in scores.items():
        item, n = f"{name}: {task}", len(each.values)
        records += [
            make(item, quantity, unit, each.mean(), n, baseline=scores[FULL].mean().value),
            make(item, "compression of a 16-bit cache", "x", each.ratio, n, baseline=1.0),
        ]
    return records


def _print_bench(
    results: dict[str, dict[str, Scores]],
    overall: dict[str, dict[str, Scores]],
    unavailable: dict[str, str] | None = None,
) -> None:
    """One row a cache: compression, pooled recall with interval, each task, continuation loss.

    Args:
        results: Scores by task and cache.
        overall: Scores that have an interval of their own in the table.
        unavailable: Caches without figures and why, a row each below the others.
    """
    recall = {task: scores for task, scores in results.items() if task != "continuation"}
    loss = results.get("continuation")
    columns = ["cache", "x smaller", *(f"{name}, % [95%]" for name in overall), *recall]
    rows = []
    for name, each in next(iter((overall | results).values())).items():
        rows.append([name, f"{each.ratio:.2f}"])
        rows[-1] += [cell(scores[name].mean(), ".1f", factor=100) for scores in overall.values()]
        rows[-1] += [f"{100 * scores[name].mean().value:.1f}" for scores in recall.values()]
        rows[-1] += [f"{loss[name].mean().value:.4f}"] if loss else []
    show(columns + ["loss, nats"] * bool(loss), [*rows, *([name, "not run"] for name in unavailable or ())])
    for name, reason in (unavailable or {}).items():
        typer.echo(f"{name} was not run: {reason}")

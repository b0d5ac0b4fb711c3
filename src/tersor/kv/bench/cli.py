"""`tersor bench kv`, `quantizers`, `saliency` and `merging`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor._console import spinner
from tersor.bench.runs import command_line, report_records
from tersor.zoo import loading as _checkpoints

if TYPE_CHECKING:
    from tersor.bench.records import Record
    from tersor.kv.bench.recall import Plan, Scores


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
    out: Annotated[Path | None, typer.Option(help="Write records here; an interrupted run resumes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record a line instead of the table.")] = False,
) -> None:
    """Compare KV caches on recall, needles and continuation loss over real text, at their real bytes."""
    plan = _plan(model, samples, continuations, task, contender, peers, mode, context_bytes, seed)
    prose = _prose(text)
    location = _checkpoints.resolve(model)
    from tersor.kv.bench.contenders import pick
    from tersor.kv.bench.peers import unavailable
    from tersor.kv.bench.recall import run_plan

    rivals = pick(contender, with_peers=peers)
    network, tokenizer = _checkpoints.load(location, "cpu")
    progress = None if out is None else out.with_suffix(out.suffix + ".partial")
    results: dict[str, dict[str, Scores]] = {}
    with spinner() as status:
        status.update(f"{plan.tasks[0]} ...")
        for name, scores in run_plan(plan, network, tokenizer.encode, prose, rivals, progress):
            results[name] = scores
            status.update(f"{name} done")
    records = _bench_records(plan, results, command_line())
    report_records(records, out, as_json, lambda: _print_bench(results, unavailable=unavailable() if peers else {}))
    if progress is not None:
        progress.unlink(missing_ok=True)


def bench_quantizers(
    bits: Annotated[int, typer.Option(help="Bits of every number: 2, 4 or 8.")] = 4,
    passages: Annotated[int, typer.Option(help="Passages of the book to continue.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of passages and of the key bias.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write records here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record a line instead of the table.")] = False,
) -> None:
    """Compare layouts of minima and steps under outlier channels, key shift and key bias, on tiny-lm."""
    if bits not in (2, 4, 8):
        raise ValueError(f"--bits {bits} must be 2, 4 or 8")
    if passages < 1:
        raise ValueError(f"--passages {passages} must be at least 1")
    from tersor.kv.bench.layouts import score_layouts

    prose = _prose(None)
    network, tokenizer = _checkpoints.load(_checkpoints.resolve("tiny-lm"), "cpu")
    with spinner() as status:
        status.update(f"{passages} passages")
        scores = score_layouts(network, tokenizer.encode, prose, n=passages, bits=bits, seed=seed)
    records = _layout_records(scores, bits, seed, command_line())
    report_records(records, out, as_json, lambda: _print_layouts(scores))


def bench_saliency(
    samples: Annotated[int, typer.Option(help="Samples of 16 questions.")] = 500,
    contender: Annotated[list[str] | None, typer.Option(help="Compare this cache alone; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write records here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record a line instead of the table.")] = False,
) -> None:
    """Compare saliency metrics on tiny-recall, where every fact is one token that is kept, rounded or gone."""
    if samples < 1:
        raise ValueError(f"--samples {samples} must be at least 1")
    from tersor import zoo
    from tersor.kv.bench.contenders import pick
    from tersor.kv.bench.pair_recall import score_pairs

    rivals = pick(contender, group_size=16)
    with spinner() as status:
        status.update(f"{samples} samples")
        scores = score_pairs(zoo.load_model("tiny-recall"), rivals, n=samples, seed=seed)
    records = _score_records(
        "pair recall", scores, quantity="recall", unit="share", model="tiny-recall", seed=seed, command=command_line()
    )
    report_records(records, out, as_json, lambda: _print_bench({}, {"pair recall": scores}))


def bench_merging(
    model: Annotated[
        str, typer.Option(help="Checkpoint folder or zoo name, of layers alike in pairs.")
    ] = "tiny-lm-tied",
    compare: Annotated[str, typer.Option(help="'pairs': ways to merge; 'bytes': with and beside ZipCache.")] = "pairs",
    samples: Annotated[int, typer.Option(help="Questions a task.")] = 50,
    continuations: Annotated[int, typer.Option(help="Passages to continue.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of questions and passages.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write records here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record a line instead of the table.")] = False,
) -> None:
    """Merge ever more pairs of layers, deepest first, or compare merging with fewer bits at equal bytes.

    'pairs' merges by MiniCache, with and without retention, and by plain averaging. 'bytes' merges all but the first.
    The later layer of each pair caches twice as long vectors (with the same output), as layers of real models differ.
    """
    if compare not in ("pairs", "bytes"):
        raise ValueError(f"--compare {compare!r} must be 'pairs' or 'bytes'")
    if samples < 1 or continuations < 1:
        raise ValueError(f"--samples {samples} and --continuations {continuations} must be at least 1")
    location = _checkpoints.resolve(model)
    from tersor.kv.bench.merging_curves import merging_contenders, stacked_contenders, with_longer_layers
    from tersor.kv.bench.recall import pooled, score_continuation, score_recall
    from tersor.kv.bench.tasks import PLANTED, recall_samples

    network, tokenizer = _checkpoints.load(location, "cpu")
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
    shared: dict[str, Any] = {"model": model, "seed": seed, "command": command_line()}
    records = _score_records("planted facts", recall, quantity="recall, agnostic", unit="share", **shared)
    records += _score_records("continuation", loss, quantity="loss", unit="nats per byte", **shared)
    records += _added_loss_records(loss, **shared)
    report_records(records, out, as_json, lambda: _print_bench({"continuation": loss}, {"planted facts": recall}))


def _layout_records(scores: dict[str, dict[str, Scores]], bits: int, seed: int, command: str) -> list[Record]:
    """Loss added by each layout under each stress."""
    from tersor.bench.measure import machine, versions
    from tersor.bench.records import Record

    records = []
    for stress, by_layout in scores.items():
        for layout, each in by_layout.items():
            if layout == "exact":
                continue
            added = each.against(by_layout["exact"])
            records.append(
                Record(
                    system="kv", item=f"{layout}, {bits}-bit: {stress}", quantity="loss against the exact cache",
                    unit="nats per byte", claim=None, claim_source=None, measured=added.value, low=added.low,
                    high=added.high, interval=added.interval, baseline=0.0, peer=None, peer_name=None,
                    n=len(each.values), seed=seed, model="tiny-lm", shapes="trained", versions=versions(),
                    machine=machine(), command=command, verdict=None,
                )
            )  # fmt: skip
    return records


def _print_layouts(scores: dict[str, dict[str, Scores]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("layout", *scores, box=box.SIMPLE_HEAD, title="continuation loss, nats per byte")
    for layout in next(iter(scores.values())):
        table.add_row(layout, *(f"{by_layout[layout].mean().value:.4f}" for by_layout in scores.values()))
    Console().print(table)


def _plan(
    model: str,
    samples: int,
    continuations: int,
    tasks: list[str] | None,
    contenders: list[str] | None,
    peers: bool,
    mode: str,
    context_bytes: int,
    seed: int,
) -> Plan:
    from tersor.kv.bench.tasks import TASKS

    if unknown := [name for name in tasks or () if name not in TASKS]:
        raise ValueError(f"--task {unknown} is unknown; choose from {list(TASKS)}")
    if mode not in ("aware", "agnostic"):
        raise ValueError(f"--mode {mode!r} must be 'aware' or 'agnostic'")
    if samples < 1 or continuations < 0:
        raise ValueError(f"--samples {samples} must be at least 1 and --continuations {continuations} at least 0")
    from tersor.kv.bench.contenders import pick
    from tersor.kv.bench.recall import Plan

    names = tuple(each.name for each in pick(contenders, with_peers=peers))
    return Plan(model, tuple(tasks or TASKS), samples, mode, seed, context_bytes, names, continuations)  # type: ignore[arg-type]


def _prose(file: Path | None) -> str:
    from tersor import zoo
    from tersor.kv.bench.tasks import ascii_fold

    if file is None:
        return ascii_fold(zoo.book())
    if not file.is_file():
        raise ValueError(f"--text {file}: no such file")
    return ascii_fold(file.read_text(encoding="utf-8", errors="replace"))


def _bench_records(plan: Plan, results: dict[str, dict[str, Scores]], command: str) -> list[Record]:
    """Two records a contender and task, quality and compression; planted facts together come first."""
    from tersor.kv.bench.recall import pooled

    recall = pooled(results)
    records = []
    for task, scores in (({"planted facts": recall} if recall else {}) | results).items():
        quantity, unit = ("loss", "nats per byte") if task == "continuation" else (f"recall, {plan.mode}", "share")
        records += _score_records(
            task, scores, quantity=quantity, unit=unit, model=plan.model, seed=plan.seed, command=command
        )
    return records


def _score_records(
    task: str, scores: dict[str, Scores], *, quantity: str, unit: str, model: str, seed: int, command: str
) -> list[Record]:
    from tersor.bench.measure import machine, versions
    from tersor.bench.records import Record
    from tersor.kv.bench.contenders import FULL

    records = []
    for name, each in scores.items():
        mean = each.mean()
        shared: dict[str, Any] = {
            "system": "kv", "item": f"{name}: {task}", "claim": None, "claim_source": None, "peer": None,
            "peer_name": None, "n": len(each.values), "seed": seed, "model": model, "shapes": "trained",
            "versions": versions(), "machine": machine(), "command": command, "verdict": None,
        }  # fmt: skip
        records.append(
            Record(
                quantity=quantity, unit=unit, measured=mean.value, low=mean.low, high=mean.high,
                interval=mean.interval, baseline=scores[FULL].mean().value, **shared,
            )
        )  # fmt: skip
        records.append(
            Record(
                quantity="compression of a 16-bit cache", unit="x", measured=each.ratio, low=None, high=None,
                interval=None, baseline=1.0, **shared,
            )
        )  # fmt: skip
    return records


def _added_loss_records(loss: dict[str, Scores], *, model: str, seed: int, command: str) -> list[Record]:
    """Loss that each cache adds to the full one, by difference on the same passages."""
    from tersor.bench.measure import machine, versions
    from tersor.bench.records import Record
    from tersor.kv.bench.contenders import FULL

    records = []
    for name, each in loss.items():
        added = each.against(loss[FULL])
        records.append(
            Record(
                system="kv", item=f"{name}: added loss", quantity="loss against the full cache", unit="nats per byte",
                claim=None, claim_source=None, measured=added.value, low=added.low, high=added.high,
                interval=added.interval, baseline=0.0, peer=None, peer_name=None, n=len(each.values), seed=seed,
                model=model, shapes="trained", versions=versions(), machine=machine(), command=command, verdict=None,
            )
        )  # fmt: skip
    return records


def _print_bench(
    results: dict[str, dict[str, Scores]],
    overall: dict[str, dict[str, Scores]] | None = None,
    *,
    unavailable: dict[str, str] | None = None,
) -> None:
    """One row a cache: compression, planted facts (or ``overall``) with interval, tasks, continuation loss.

    ``unavailable``: caches without figures and why, a row each below the others.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from tersor.kv.bench.recall import pooled

    if overall is None:
        overall = {"planted facts": pooled(results)} if pooled(results) else {}
    recall = {task: scores for task, scores in results.items() if task != "continuation"}
    table = Table("cache", box=box.SIMPLE_HEAD)
    for title in ("x smaller", *(f"{name}, % [95%]" for name in overall), *recall):
        table.add_column(title, justify="right")
    if "continuation" in results:
        table.add_column("loss, nats", justify="right")
    first = next(iter((overall | results).values()))
    for name, each in first.items():
        cells = [name, f"{each.ratio:.2f}"]
        for scores in overall.values():
            mean = scores[name].mean()
            cells.append(f"{100 * mean.value:.1f} [{100 * mean.low:.1f}, {100 * mean.high:.1f}]")
        cells += [f"{100 * scores[name].mean().value:.1f}" for scores in recall.values()]
        if "continuation" in results:
            cells.append(f"{results['continuation'][name].mean().value:.4f}")
        table.add_row(*cells)
    for name in unavailable or ():
        table.add_row(name, "not run")
    Console().print(table)
    for name, reason in (unavailable or {}).items():
        Console().print(f"{name} was not run: {reason}", markup=False, highlight=False)

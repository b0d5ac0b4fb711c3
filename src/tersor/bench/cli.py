"""`tersor demo` and `tersor bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor import _checkpoints

if TYPE_CHECKING:
    from tersor.bench.kv import Plan, Scores
    from tersor.bench.records import Record

bench = typer.Typer(help="Benchmarks: JSON lines and a table.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Keep `kv` a sub-command of its own while it is the only one."""


def demo(
    only: Annotated[list[str] | None, typer.Option(help="Run this system alone; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("tersor-report"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record a line instead of the table.")] = False,
) -> None:
    """Run every system on the embedded models, print the scoreboard and write the HTML report."""
    from tersor.bench.demos import DEMOS, get_demo
    from tersor.bench.records import write_jsonl
    from tersor.bench.report import write_report
    from tersor.bench.scoreboard import print_scoreboard

    names = only or list(DEMOS)
    runs = {name: get_demo(name) for name in names}
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder for the report")
    records, sections = [], []
    with _status() as status:
        for name, run in runs.items():
            result = run(lambda doing, name=name: status.update(f"{name}: {doing}"))  # type: ignore[misc]
            records += result.records
            sections.append(result.section)
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "records.jsonl", records)
    write_report(out / "index.html", records, sections)
    if as_json:
        for record in records:
            typer.echo(record.to_json())
    else:
        print_scoreboard(records)
        typer.echo(f"report: {out / 'index.html'}")


@bench.command("kv")
def bench_kv(
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub name or zoo name.")] = "tiny-lm",
    samples: Annotated[int, typer.Option(help="Questions a task.")] = 100,
    continuations: Annotated[int, typer.Option(help="Passages to continue; 0 leaves that part out.")] = 64,
    task: Annotated[list[str] | None, typer.Option(help="Run this recall task alone; may be repeated.")] = None,
    contender: Annotated[list[str] | None, typer.Option(help="Compare this cache alone; may be repeated.")] = None,
    mode: Annotated[str, typer.Option(help="'aware' compresses the question too, 'agnostic' does not.")] = "aware",
    text: Annotated[
        Path | None, typer.Option(help="Text to ask about; the embedded held-out book if left out.")
    ] = None,
    context_bytes: Annotated[int, typer.Option(help="Length of a context with its question.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the questions.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write records here; an interrupted run resumes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record a line instead of the table.")] = False,
) -> None:
    """Compare KV caches on recall, needles and continuation loss over real text, at their real bytes."""
    plan = _plan(model, samples, continuations, task, contender, mode, context_bytes, seed)
    prose = _prose(text)
    location = _checkpoints.resolve(model)
    from tersor.bench.contenders import pick
    from tersor.bench.kv import run_plan
    from tersor.bench.records import write_jsonl

    rivals = pick(contender)
    network, tokenizer = _checkpoints.load(location, "cpu")
    progress = None if out is None else out.with_suffix(out.suffix + ".partial")
    results: dict[str, dict[str, Scores]] = {}
    with _status() as status:
        status.update(f"{plan.tasks[0]} ...")
        for name, scores in run_plan(plan, network, tokenizer.encode, prose, rivals, progress):
            results[name] = scores
            status.update(f"{name} done")
    records = _bench_records(plan, results, "tersor " + " ".join(sys.argv[1:]))
    if out is not None:
        write_jsonl(out, records)
        progress.unlink(missing_ok=True)  # type: ignore[union-attr]
    if as_json:
        for record in records:
            typer.echo(record.to_json())
    else:
        _print_bench(results)


def _plan(
    model: str,
    samples: int,
    continuations: int,
    tasks: list[str] | None,
    contenders: list[str] | None,
    mode: str,
    context_bytes: int,
    seed: int,
) -> Plan:
    from tersor.bench.tasks import TASKS

    if unknown := [name for name in tasks or () if name not in TASKS]:
        raise ValueError(f"--task {unknown} is unknown; choose from {list(TASKS)}")
    if mode not in ("aware", "agnostic"):
        raise ValueError(f"--mode {mode!r} must be 'aware' or 'agnostic'")
    if samples < 1 or continuations < 0:
        raise ValueError(f"--samples {samples} must be at least 1 and --continuations {continuations} at least 0")
    from tersor.bench.contenders import pick
    from tersor.bench.kv import Plan

    names = tuple(each.name for each in pick(contenders))
    return Plan(model, tuple(tasks or TASKS), samples, mode, seed, context_bytes, names, continuations)  # type: ignore[arg-type]


def _prose(file: Path | None) -> str:
    from tersor import zoo
    from tersor.bench.tasks import ascii_fold

    if file is None:
        return ascii_fold(zoo.book())
    if not file.is_file():
        raise ValueError(f"--text {file}: no such file")
    return ascii_fold(file.read_text(encoding="utf-8", errors="replace"))


def _bench_records(plan: Plan, results: dict[str, dict[str, Scores]], command: str) -> list[Record]:
    """One record a contender and task, and one over all recall tasks."""
    from tersor.bench.contenders import FULL
    from tersor.bench.kv import pooled
    from tersor.bench.measure import machine, versions
    from tersor.bench.records import Record

    common: dict[str, Any] = {
        "claim": None, "claim_source": None, "peer": None, "peer_name": None, "seed": plan.seed, "model": plan.model,
        "shapes": "trained", "versions": versions(), "machine": machine(), "command": command, "verdict": None,
    }  # fmt: skip
    recall = pooled(results)
    records = []
    for task, scores in {"all recall tasks": recall, **results}.items():
        quantity, unit = ("loss", "nats per byte") if task == "continuation" else (f"recall, {plan.mode}", "share")
        for name, each in scores.items():
            mean = each.mean()
            shared = {"system": "kv", "n": len(each.values), **common}
            records.append(
                Record(
                    item=f"{name}: {task}", quantity=quantity, unit=unit, measured=mean.value, low=mean.low,
                    high=mean.high, interval=mean.interval, baseline=scores[FULL].mean().value, **shared,
                )
            )  # fmt: skip
            records.append(
                Record(
                    item=f"{name}: {task}", quantity="compression of a 16-bit cache", unit="x", measured=each.ratio,
                    low=None, high=None, interval=None, baseline=1.0, **shared,
                )
            )  # fmt: skip
    return records


def _print_bench(results: dict[str, dict[str, Scores]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from tersor.bench.kv import pooled

    recall = {task: scores for task, scores in results.items() if task != "continuation"}
    table = Table(box=box.SIMPLE_HEAD)
    for title in (
        "cache",
        "x smaller",
        "recall % [95%]",
        *recall,
        *(["loss, nats"] if "continuation" in results else []),
    ):
        table.add_column(title, justify="left" if title == "cache" else "right")
    for name, total in pooled(results).items():
        mean = total.mean()
        cells = [name, f"{total.ratio:.2f}", f"{100 * mean.value:.1f} [{100 * mean.low:.1f}, {100 * mean.high:.1f}]"]
        cells += [f"{100 * scores[name].mean().value:.1f}" for scores in recall.values()]
        if "continuation" in results:
            cells.append(f"{results['continuation'][name].mean().value:.4f}")
        table.add_row(*cells)
    Console().print(table)


def _status() -> Any:
    """A spinner on standard error, so that standard output stays clean."""
    from rich.console import Console

    return Console(stderr=True).status("starting")

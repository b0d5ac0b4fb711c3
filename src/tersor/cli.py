"""The command line: a typer app whose commands load what they need when they run.

Exit codes: 0 success, 1 failure, 2 bad input, 130 interrupted. Errors are one line on standard error.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.main import get_command

from tersor import __version__
from tersor._console import prefixed, spinner
from tersor._errors import TersorError
from tersor._lazy import MissingExtraError
from tersor._options import FOLDER, SettingsCommand, check_options
from tersor.bench.runs import AsJson, Demo, without
from tersor.drag.bench.cli import bench_drag
from tersor.drag.cli import drag
from tersor.drag.train_cli import DiffusersCommand, train_drag
from tersor.experts.bench.cli import bench_experts
from tersor.experts.cli import experts
from tersor.grids.cli import images
from tersor.grids.nar.bench.cli import bench_nar
from tersor.grids.nar.train_cli import train
from tersor.grids.zipar.bench.cli import bench_images
from tersor.kv.bench.cli import bench_kv, bench_merging, bench_quantizers, bench_saliency
from tersor.kv.bench.cli_vision import bench_photos, bench_vlm
from tersor.kv.cli import generate
from tersor.kv.tune.cli import tune
from tersor.opening.bench.cli import bench_opening
from tersor.opening.bench.cli_intjudge import bench_intjudge
from tersor.opening.cli import opening
from tersor.opening.intjudge.cli import intjudge
from tersor.ptq.bench.cli import bench_ptq, bench_ptq_speed
from tersor.ptq.cli import quantize
from tersor.rl.bench.cli import bench_zipr1
from tersor.rl.cli import zipr1

if TYPE_CHECKING:
    from tersor.bench.runs import DemoResult, OnProgress

_PLOTS = {"matplotlib": ("bench", "plots")}
_QUANTO = {"optimum.quanto": ("bench", "the comparison with quanto's cache")}
_PICTURES = {"PIL": "images"}
_ONNX = dict.fromkeys(("onnx", "onnxruntime", "onnxscript", "PIL"), "ptq")
_JUDGE = dict.fromkeys(("peft", "trl"), "rl")
_ARENA = dict.fromkeys(("PIL", "scipy"), "arena")
_DRAG = dict.fromkeys(("PIL", "accelerate", "diffusers", "scipy"), "drag")
#: System of `tersor demo` -> its demo.
DEMOS: dict[str, Demo] = {
    "zipcache": Demo(home="tersor.kv.demos.zipcache:run", parts=_PLOTS | _QUANTO),
    "minicache": Demo(home="tersor.kv.demos.minicache:run", parts=_PLOTS),
    "zipar": Demo(home="tersor.grids.zipar.demo:run", needs=_PICTURES),
    "nar": Demo(home="tersor.grids.nar.demo:run", needs=_PICTURES),
    "zipvl": Demo(home="tersor.kv.demos.zipvl:run", needs=_PICTURES, parts=_PLOTS),
    "ptq": Demo(home="tersor.ptq.demo:run", needs=_ONNX, parts=_PLOTS),
    "meswitch": Demo(home="tersor.experts.demo:run", parts=_PLOTS),
    "zipr1": Demo(home="tersor.rl.demo:run", needs=_PICTURES, parts=_PLOTS),
    "opening": Demo(home="tersor.opening.demo:run", needs=_ARENA),
    "intjudge": Demo(home="tersor.opening.intjudge.demo:run", needs=_ARENA | _JUDGE, parts=_PLOTS),
    "draganything": Demo(home="tersor.drag.demo:run", needs=_DRAG),
}
#: Command of `tersor bench` -> its function.
BENCHMARKS: dict[str, Callable[..., None]] = {
    "kv": bench_kv,
    "quantizers": bench_quantizers,
    "saliency": bench_saliency,
    "merging": bench_merging,
    "images": bench_images,
    "nar": bench_nar,
    "ptq": bench_ptq,
    "ptq-speed": bench_ptq_speed,
    "vlm": bench_vlm,
    "photos": bench_photos,
    "zipr1": bench_zipr1,
    "opening": bench_opening,
    "intjudge": bench_intjudge,
    "drag": bench_drag,
}

#: Parent of every complaint about arguments; typer exports only the child, and which click it stands on varies.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="tersor",
    help="Cheaper generative models, with the cost in quality printed next to every saving.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Benchmarks: JSON lines and a table.", no_args_is_help=True)
app.command(cls=SettingsCommand)(generate)
app.command()(quantize)
app.command()(tune)
experts.command("bench")(bench_experts)
train.command(cls=SettingsCommand)(zipr1)
train.command()(intjudge)
train.command("drag", cls=DiffusersCommand)(train_drag)
for name, function in BENCHMARKS.items():
    bench.command(name)(function)
for name, group in {
    "bench": bench,
    "drag": drag,
    "experts": experts,
    "images": images,
    "opening": opening,
    "train": train,
}.items():
    app.add_typer(group, name=name)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="TERSOR_DEBUG", help="Show where an error came from.")
    ] = False,
) -> None:
    """Cheaper generative models, with the cost in quality printed next to every saving."""
    context.ensure_object(SimpleNamespace).debug = debug


@app.command()
def demo(
    only: Annotated[list[str] | None, typer.Option(help="Run this system alone; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.", metavar=FOLDER)] = Path("tersor-report"),
    as_json: AsJson = False,
) -> None:
    """Run every system on the embedded models, print the scoreboard and write the HTML report."""
    from tersor.bench.report import write_report
    from tersor.bench.runs import report_records
    from tersor.bench.scoreboard import print_scoreboard

    runs = {system: get_demo(system) for system in only or runnable()}
    for line in without({system: DEMOS[system] for system in runs}):
        typer.echo(line, err=True)
    records, sections = [], []
    with spinner() as status:
        for system, run_demo in runs.items():
            result = run_demo(prefixed(status.update, system))
            records += result.records
            sections.append(result.section)
    out.mkdir(parents=True, exist_ok=True)
    write_report(out / "index.html", records, sections)

    def print_table() -> None:
        print_scoreboard(records)
        typer.echo(f"report: {out / 'index.html'}")

    report_records(records, out / "records.jsonl", as_json, print_table)


def runnable() -> list[str]:
    """The systems whose packages are installed; says of each other one how to have it."""
    found = []
    for system, each in DEMOS.items():
        if (obstacle := each.obstacle()) is None:
            found.append(system)
        else:
            typer.echo(f"left out: {system}; {obstacle}", err=True)
    return found


def get_demo(system: str) -> Callable[[OnProgress], DemoResult]:
    """The demo of ``system``; raises `ValueError` for an unknown one, `MissingExtraError` for one that cannot run."""
    if system not in DEMOS:
        raise TersorError(f"--only {system!r} is no system of the demo; choose one of {sorted(DEMOS)}")
    if (obstacle := DEMOS[system].obstacle()) is not None:
        raise MissingExtraError(obstacle)
    module, _, name = DEMOS[system].home.partition(":")
    function: Callable[[OnProgress], DemoResult] = getattr(import_module(module), name)
    return function


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show machine, versions and kernels in use: what a bug report should contain."""
    from tersor.bench.measure import machine, versions
    from tersor.lowbit.kernels import KERNELS

    facts = {
        "tersor": __version__,
        "machine": machine(),
        "versions": versions(),
        "kernels": {operation: _kernels_in_use(operation) for operation in KERNELS},
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        lines = [f"{key}: {entry}" for key, entry in value.items()] if isinstance(value, dict) else [str(value)]
        typer.echo(f"{name}\n  " + "\n  ".join(lines))


def _kernels_in_use(operation: str) -> str:
    """What runs on each device here, and why a faster back end does not."""
    import torch

    from tersor.lowbit.kernels import chosen_backend, unavailable_reason

    lines = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        chosen = chosen_backend(operation, device)
        own = "triton" if device == "cuda" else "cpu"
        reason = unavailable_reason(operation, own, device)
        lines.append(f"{chosen} on {device}" + (f" ({own} does not run: {reason})" if reason else ""))
    return ", ".join(lines)


_INTERRUPTED = 130
#: Paths that the user must mend.
_BAD_PATH = {
    *(errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS),
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    warnings.showwarning = _note
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; every error becomes one line."""
    settings = SimpleNamespace(debug=False)
    command = get_command(app)
    check_options(command)
    try:
        result = command.main(arguments, prog_name="tersor", standalone_mode=False, obj=settings)
    except UsageError as error:
        return _say(error.format_message(), 2)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        result = _INTERRUPTED
    except Exception as error:
        if settings.debug:
            traceback.print_exc()
        return _answer(error)
    if result == _INTERRUPTED:  # some releases of typer turn the interrupt into this exit code themselves
        return _say("interrupted", _INTERRUPTED)
    return result if isinstance(result, int) else 0


def _answer(error: Exception) -> int:
    """Say in one line what went wrong; the exit code tells whose fault it was."""
    if isinstance(error, TersorError):
        return _say(str(error), 2)
    if isinstance(error, OSError) and error.filename is not None:
        said = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        return _say(f"{said}: {error.strerror}", 2 if error.errno in _BAD_PATH else 1)
    if isinstance(error, MissingExtraError):
        return _say(str(error), 1)
    if isinstance(error, MemoryError):
        return _say("there is not enough memory for this", 1)
    what = " ".join(str(error).split())
    return _say(f"{type(error).__name__}: {what[:300]} (tersor --debug … shows where)", 1)


def _say(message: str, code: int) -> int:
    typer.echo(f"tersor: {' '.join(message.split())}", err=True)
    return code


def _note(message: Warning | str, *where: Any, **more: Any) -> None:
    """A warning in one line, without the source line that Python would show."""
    _say(f"note: {message}", 0)

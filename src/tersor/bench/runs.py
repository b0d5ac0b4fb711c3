"""What the demo and benchmark commands of all systems share: options, progress files, records and tables."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import typer

from tersor import _atomic
from tersor._errors import TersorError
from tersor._lazy import MissingExtraError, advice, installed

if TYPE_CHECKING:
    from tersor.bench.measure import Estimate
    from tersor.bench.records import Record
    from tersor.bench.report import Figure, Section

Out = Annotated[Path | None, typer.Option(help="Write records here.")]
ResumableOut = Annotated[Path | None, typer.Option(help="Write records here; an interrupted run resumes.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON record a line instead of the table.")]

#: Seed of everything that `tersor demo` draws.
DEMO_SEED = 2024

T = TypeVar("T")
#: Reports what is being done; shown beside the spinner.
OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class DemoResult:
    """What one system contributes to `tersor demo`: its scoreboard records and its section of the report."""

    records: list[Record]
    section: Section


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A system of `tersor demo`.

    Args:
        home: "module:function", loaded when it runs; the function reports progress to its argument.
        needs: Packages without which it cannot run -> the extra that brings them.
        parts: Packages without which a part is left out -> their extra, and what that part is.
    """

    home: str
    needs: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def obstacle(self) -> str | None:
        """The line that says what is missing for it to run, if something is."""
        return next((advice(name, extra) for name, extra in self.needs.items() if not installed(name)), None)


def without(demos: Mapping[str, Demo]) -> list[str]:
    """A line for each package that is missing: what ``demos`` leave out, and how to have it."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for system, demo in demos.items():
        for package, (extra, part) in demo.parts.items():
            if not installed(package):
                lines.setdefault((package, extra, part), []).append(system)
    return [
        f"left out: {part} of {', '.join(systems)}; {advice(package, extra)}"
        for (package, extra, part), systems in lines.items()
    ]


def drawn(*figures: Callable[[], Figure]) -> list[Figure]:
    """The figures whose packages are installed; `without` has said before which are not."""
    found = []
    for draw in figures:
        with suppress(MissingExtraError):
            found.append(draw())
    return found


def command_line() -> str:
    """The command as it was given, for records."""
    return "tersor " + shlex.join(sys.argv[1:])


@contextmanager
def progress_file(out: Path | None) -> Iterator[Path | None]:
    """The file beside ``out`` in which a run keeps what is done; removed when the block ends without an error."""
    file = None if out is None else out.with_suffix(out.suffix + ".partial")
    yield file
    if file is not None:
        file.unlink(missing_ok=True)


class Finished(Generic[T]):
    """Results of the parts of one plan, kept in a file so that an interrupted run goes on after its last part.

    Args:
        file: Where to keep them; None keeps them in memory alone.
        plan: What is run, a dataclass; only the same plan goes on.
        read: Makes a result from what JSON makes of it.

    Raises:
        ValueError: If the file belongs to another plan.
    """

    def __init__(self, file: Path | None, plan: Any, read: Callable[[Any], T]) -> None:
        self.file, self.plan, self.results = file, json.loads(json.dumps(asdict(plan))), dict[str, T]()
        if file is not None and file.is_file():
            try:
                state = json.loads(file.read_text(encoding="utf-8"))
                plan, done = state["plan"], {part: read(each) for part, each in state["done"].items()}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise TersorError(f"{file} holds no unfinished run; remove it") from None
            if plan != self.plan:
                raise TersorError(
                    f"{file} belongs to a run with other settings; remove it, or repeat those settings to resume"
                )
            self.results = done

    def once(self, part: str, run: Callable[[], T]) -> T:
        """The result of ``part``, computed by ``run`` unless an earlier run kept it."""
        if part not in self.results:
            self.results[part] = run()
            if self.file is not None:
                state = {"plan": self.plan, "done": self.results}
                _atomic.write_text(self.file, json.dumps(state, default=asdict))
        return self.results[part]


def record_maker(system: str, **shared: Any) -> Callable[..., Record]:
    """A function that makes records of ``system`` without a claim, unless told otherwise.

    The function takes ``(item, quantity, unit, value, n, **fields)``; ``value`` has an interval if it is an
    `Estimate`, and ``fields`` override what the records share.

    Args:
        system: What the records are about.
        **shared: Fields of all records, such as ``model`` and ``seed``; ``command`` is the command line by default.
    """
    from tersor.bench.measure import as_fields, machine, versions
    from tersor.bench.records import Record

    common: dict[str, Any] = {
        **dict.fromkeys(("claim", "claim_source", "baseline", "peer", "peer_name", "verdict")),
        "system": system,
        "shapes": "trained",
        "versions": versions(),
        "machine": machine(),
        "command": command_line(),
        **shared,
    }

    def make(item: str, quantity: str, unit: str, value: Estimate | float, n: int | None, **fields: Any) -> Record:
        own = {"item": item, "quantity": quantity, "unit": unit, "n": n, **as_fields(value)}
        return Record(**(common | own | fields))

    return make


def demo_records(system: str, model: str) -> Callable[..., Record]:
    """`record_maker` of ``tersor demo``, on a model of the zoo."""
    return record_maker(system, model=model, seed=DEMO_SEED, command=f"tersor demo --only {system}")


def report_records(records: list[Record], out: Path | None, as_json: bool, print_table: Callable[[], None]) -> None:
    """Write the records to ``out`` if there is one, then print them as JSON lines or as their table."""
    from tersor.bench.records import write_jsonl

    if out is not None:
        write_jsonl(out, records)
    if as_json:
        for record in records:
            typer.echo(record.to_json())
    else:
        print_table()


def show(columns: Sequence[str], rows: Iterable[Sequence[str]], *, names: int = 1, title: str | None = None) -> None:
    """Print a table: the first ``names`` columns are names and stand left, all others are numbers and stand right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < names else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, names: int = 1) -> list[str]:
    """Lines of a Markdown table; columns stand as in `show`."""
    marks = ["---" if place < names else "---:" for place in range(len(columns))]
    return [_line(columns), f"|{'|'.join(marks)}|", *map(_line, rows)]


def _line(cells: Iterable[Any]) -> str:
    return "|" + "".join(f" {cell} |" if cell != "" else " |" for cell in cells)


def cell(value: Estimate, form: str, *, factor: float = 1.0) -> str:
    """``value [low, high]`` for a table, each number times ``factor`` and formatted by ``form``, such as ".1f"."""
    numbers = (factor * each for each in (value.value, value.low, value.high))
    middle, low, high = (format(each, form) for each in numbers)
    return f"{middle} [{low}, {high}]"


def whole_numbers(option: str, text: str, *, least: int = 0) -> list[int]:
    """The numbers of an option such as ``1,4,16``; an empty text holds none.

    Raises:
        ValueError: If a part is no whole number of at least ``least``.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise TersorError(f"{option} {text!r} must be whole numbers with commas between them, such as 1,4,16")
    return [int(part) for part in parts]

"""The scoreboard: records as a table in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tersor._errors import TersorError
from tersor.bench.records import Record

# Below this many columns the comparison values share one column and the count goes.
_WIDE = 100

_WIDE_COLUMNS = (
    *("system", "what was run", "paper", "measured"),
    *("baseline", "simple alternative", "n", "verdict"),
)
_NARROW_COLUMNS = ("system", "what was run", "measured", "to compare with", "verdict")
# Numbers are read as a whole; everything else may wrap.
_UNBROKEN = ("system", "measured", "baseline", "n")

# Verdict -> (sign, style). The sign carries the meaning where colours do not show.
_VERDICT_LOOKS = {
    "holds": ("✓", "bold green"),
    "partly": ("~", "bold yellow"),
    "fails": ("✗", "bold red"),
    "too few to tell": ("?", "bold"),
    "not here: needs a GPU": ("–", "dim"),
}


#: A word of the rows that not every reader knows -> what it means; shown where a row uses it.
GLOSSARY = {
    "salient": "found important, by the attention that it gets",
    "nominal": "by arithmetic, leaving out what must be stored beside the codes",
    "raster": "writing an image token after token, row by row",
    "PAR-4X": "writing four parts of an image side by side",
    "passes": "runs through the model",
    "if time were passes": "how many times as fast, if every pass took the same time",
    "steps": "updates of the weights",
    "LSQ": "a quantizer whose grid follows the mean size of the numbers",
    "MSE": "a quantizer whose grid makes the least squared error",
    "k=": "input channels of each layer that stay in 16 bits",
    "n-grams": "a classifier that counts pieces of words",
}


def explained(records: Iterable[Record], *fields: str) -> list[tuple[str, str]]:
    """The words of `GLOSSARY` that these fields of the records use, with their meaning."""
    texts = [str(getattr(record, field) or "") for record in records for field in fields]
    return [(word, meaning) for word, meaning in GLOSSARY.items() if any(word in text for text in texts)]


@dataclass(frozen=True)
class Group:
    """The rows of one system: the record that answers its paper's headline, and the details below it."""

    headline: Record
    details: tuple[Record, ...]

    @property
    def rows(self) -> tuple[Record, ...]:
        """Headline first, then the details in their order."""
        return (self.headline, *self.details)


def by_system(records: Iterable[Record]) -> list[Group]:
    """Group records by system, in order of appearance.

    The headline of a system is its first record with a verdict, or its first record if none has one.
    """
    systems: dict[str, list[Record]] = {}
    for record in records:
        systems.setdefault(record.system, []).append(record)
    groups = []
    for rows in systems.values():
        headline = next((row for row in rows if row.verdict is not None), rows[0])
        groups.append(Group(headline, tuple(row for row in rows if row is not headline)))
    return groups


def build_table(records: Sequence[Record], *, width: int) -> Table:
    """The scoreboard as a rich table for a terminal of ``width`` columns.

    From 100 columns on: system, what was run, the paper's claim, measured with interval, baseline, a simple
    alternative, n, verdict. Below that, claim and comparisons move into one column.
    Raises `ValueError` without records.
    """
    if not records:
        raise TersorError("there are no records to show; run `tersor demo` to make some")
    wide = width >= _WIDE
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    for title in _WIDE_COLUMNS if wide else _NARROW_COLUMNS:
        table.add_column(
            title, justify="right" if title == "n" else "left", no_wrap=title in _UNBROKEN, overflow="fold"
        )
    for group in by_system(records):
        for record in group.rows:
            table.add_row(*_cells(record, wide=wide, headline=record is group.headline))
        table.add_section()
    return table


def print_scoreboard(records: Sequence[Record], console: Console | None = None) -> None:
    """Print the table on ``console`` (standard output by default), fitted to its width."""
    console = console or Console()
    console.print(build_table(records, width=console.width))
    for word, meaning in explained(records, "item", "quantity", "unit", "peer_name"):
        console.print(Text(f"{word}: {meaning}", style="dim"))


def format_number(value: float | None) -> str:
    """Three significant digits or so, without an exponent where a plain number is readable; "–" for None."""
    if value is None:
        return "–"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 1:
        return f"{value:.2f}"
    return f"{value:.3f}" if size >= 0.001 or size == 0 else f"{value:.2g}"


def format_value(value: float | str | None, unit: str) -> str:
    """A number with its unit: "4.61x", "97.5%", "12.0 ms"; a share is shown in percent, text stays as it is."""
    if isinstance(value, str):
        return value
    if value is not None and unit == "share":
        return format_value(100 * value, "%")
    number = format_number(value)
    if value is None or not unit:
        return number
    return f"{number}{unit}" if unit in ("x", "%") else f"{number} {unit}"


def format_interval(record: Record) -> str:
    """Low and high in brackets, or nothing."""
    if record.low is None or record.high is None:
        return ""
    factor = 100 if record.unit == "share" else 1
    return f"[{format_number(factor * record.low)}, {format_number(factor * record.high)}]"


def format_peer(record: Record) -> str:
    """A simple alternative: value and name."""
    return "–" if record.peer is None else f"{format_value(record.peer, record.unit)} {record.peer_name}"


def _cells(record: Record, *, wide: bool, headline: bool) -> list[Text]:
    style = "bold" if headline else "dim"
    system = Text(record.system if headline else "", style="bold cyan")
    run = Text(f"{'' if headline else '· '}{record.item}", style=style)
    run.append(f"\n{'' if headline else '  '}{record.quantity}", style="not bold dim" if headline else "dim italic")
    measured = Text(format_value(record.measured, record.unit), style=style)
    if interval := format_interval(record):
        measured.append(f"\n{interval}", style="not bold dim")
    claim, baseline = format_value(record.claim, record.unit), format_value(record.baseline, record.unit)
    verdict = _verdict(record.verdict)
    if wide:
        count = "–" if record.n is None else f"{record.n:,}"
        rest = [Text(text, style="" if headline else "dim") for text in (baseline, format_peer(record), count)]
        return [system, run, Text(claim, style="" if headline else "dim"), measured, *rest, verdict]
    lines = [
        ("paper", record.claim, claim),
        ("base", record.baseline, baseline),
        ("or", record.peer, format_peer(record)),
    ]
    compare = "\n".join(f"{label} {text}" for label, value, text in lines if value is not None)
    return [system, run, measured, Text(compare, style="dim"), verdict]


def _verdict(verdict: str | None) -> Text:
    if verdict is None:
        return Text("")
    sign, style = _VERDICT_LOOKS[verdict]
    return Text(f"{sign} {verdict}", style=style)

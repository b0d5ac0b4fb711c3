"""What the modules that make tables have in common: reading records and formatting their figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tersor.bench.records import Record
from tersor.bench.runs import markdown

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TABLES, ASSETS = ROOT / "docs" / "tables", ROOT / "docs" / "assets"

#: A place on the x axis, a value, and its interval.
Point = tuple[float, float, float, float]


def parts(record: Record) -> tuple[str, str]:
    """What was compared and on what: the two parts of a record's item."""
    name, _, task = record.item.rpartition(": ")
    return name, task


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal."""
    assert value is not None  # recall is always measured
    return f"{100 * value:.1f}"


def interval(record: Record) -> str:
    """Share and interval in percent."""
    return f"{percent(record.measured)} [{percent(record.low)}, {percent(record.high)}]"


def provenance(records: list[Record]) -> str:
    """What was run, on what, with how many samples."""
    first = records[0]
    return (
        f"`{first.command}`: {first.n:,} samples, model {first.model} ({first.shapes} weights), seed {first.seed}; "
        f"{first.machine['cpu']}, torch {first.versions['torch']}, transformers {first.versions['transformers']}.\n"
    )


def device(record: Record) -> str:
    """What the times of ``record`` were measured on."""
    if record.machine["gpu"] and any(word in record.command for word in ("cuda", "gpu")):
        return f"{record.machine['gpu']}, {record.machine['cpu']}"
    return f"{record.machine['cpu']}, {record.machine['threads']} threads"


def by_key(records: list[Record], field: str = "quantity") -> dict[tuple[str, str, str], Record]:
    """Records by the two parts of their item and one of their fields."""
    return {(*parts(record), getattr(record, field)): record for record in records}


def names_of(records: list[Record]) -> list[str]:
    """What was compared, in the order of the run."""
    return list(dict.fromkeys(parts(record)[0] for record in records))


def estimate(record: Record) -> tuple[float, float, float]:
    """Value and interval of a record that has one."""
    assert record.measured is not None and record.low is not None and record.high is not None
    return record.measured, record.low, record.high


def spread(record: Record) -> str:
    """Value and interval with three digits."""
    value, low, high = estimate(record)
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def points(record: Record) -> str:
    """A difference of shares in points, with its interval."""
    value, low, high = (100 * part for part in estimate(record))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def made_on(record: Record) -> str:
    """Model, machine and libraries."""
    return f"Model {record.model}; {device(record)}, torch {record.versions['torch']}."


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, names: int = 1) -> str:
    """A Markdown table; columns after the first ``names`` are right-aligned."""
    return "\n".join(markdown(titles, rows, names=names)) + "\n"

"""What the modules that make tables have in common: reading records and formatting their figures."""

from __future__ import annotations

from pathlib import Path

from tersor.bench.records import Record

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TABLES, ASSETS = ROOT / "docs" / "tables", ROOT / "docs" / "assets"


def parts(record: Record) -> tuple[str, str]:
    """Contender and task of a `tersor bench kv` record."""
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


def markdown(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; columns after the first are right-aligned."""
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)]) + "\n"

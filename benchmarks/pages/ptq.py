"""Tables of RepAPQ: accuracy by method and bits, each part of it removed, speed of the files."""

from __future__ import annotations

from pathlib import Path

from pages.shared import (
    ASSETS,
    RESULTS,
    TABLES,
    Point,
    by_key,
    estimate,
    interval,
    made_on,
    names_of,
    parts,
    percent,
    points,
    spread,
    table,
)

from tersor.bench.plots import Line, plot_lines
from tersor.bench.records import Record, read_jsonl
from tersor.ptq.bench.accuracy import FLOAT

EXACT = "w32a32"
#: Its line would hide RepAPQ's.
SQUARES = "RepAPQ with squares for MAE"
NETWORKS = ("repvgg", "mobileone")


def accuracy_table(records: list[Record]) -> str:
    """Markdown: a row a method, a column for each number of bits."""
    known = by_key(records)
    bits = list(dict.fromkeys(parts(each)[1] for each in records if parts(each)[1] != EXACT))
    names = [name for name in names_of(records) if name != FLOAT]
    exact = known[FLOAT, EXACT, "accuracy"]
    rows = [[FLOAT, *[interval(exact)] * len(bits)]]
    for name in names:
        rows.append([name, *(_cell(known, name, each) for each in bits)])
    first = records[0]
    return (
        table(["method", *(f"{each.upper()}, % right [95 %]" for each in bits)], rows)
        + f"\n`{first.command}`: {first.n:,} held-out images ({first.shapes}). Intervals are over images, each with "
        f"its mean over seeds. {made_on(first)}\n"
    )


def _cell(known: dict[tuple[str, str, str], Record], name: str, bits: str) -> str:
    found = known.get((name, bits, "accuracy"))
    return "has 8 bits alone" if found is None else interval(found)


def ablation_table(records: list[Record]) -> str:
    """Markdown: RepAPQ whole and without each part, accuracy against floating point and divergence from it."""
    known = by_key(records)
    bits = list(dict.fromkeys(parts(each)[1] for each in records if parts(each)[1] != EXACT))
    names = [name for name in names_of(records) if name != FLOAT]
    rows = []
    for name in names:
        cells = [name]
        for each in bits:
            cells.append(points(known[name, each, "accuracy against floating point"]))
            cells.append(f"{known[name, each, 'divergence from floating point'].measured:.4f}")
            cells.append(percent(known[name, each, "largest difference between seeds"].measured))
        rows.append(cells)
    titles = ["what is trained"]
    for each in bits:
        titles += [f"{each.upper()}, points [95 %]", "divergence, nats", "between seeds, points"]
    first = records[0]
    return table(titles, rows) + f"\n`{first.command}` ({first.shapes}). {made_on(first)}\n"


def speed_table(records: list[Record]) -> str:
    """Markdown: processor time of both files by network and batch size, and what the integer one holds."""
    known, rows = by_key(records), []
    for name, batch in dict.fromkeys(parts(each) for each in records):
        row = {quantity: known[name, batch, quantity] for quantity in (
            "processor time in floating point", "processor time in integers", "speed-up", "file size",
            "integer convolutions", "layers in floating point",
        )}  # fmt: skip
        rows.append(
            [
                name, batch.removeprefix("batch "), spread(row["processor time in floating point"]),
                spread(row["processor time in integers"]), spread(row["speed-up"]),
                percent(row["file size"].measured), f"{row['integer convolutions'].measured:.0f}",
                f"{row['layers in floating point'].measured:.0f}",
            ]
        )  # fmt: skip
    first = records[0]
    titles = [
        "network", "batch", "floating point, ms [quartiles]", "integers, ms [quartiles]", "times as fast [95 %]",
        "file, % of floating point", "integer convolutions", "layers left in floating point",
    ]  # fmt: skip
    return (
        table(titles, rows)
        + f"\n`{first.command}`: in turns, medians of {first.n} rounds; {first.shapes}. {made_on(first)}\n"
    )


def plot(records: list[Record]) -> str:
    """SVG: accuracy by bits, a line a method."""
    lines: dict[str, list[Point]] = {}
    for each in records:
        name, bits = parts(each)
        if each.quantity == "accuracy" and name not in (FLOAT, SQUARES):
            value, low, high = (100 * part for part in estimate(each))
            lines.setdefault(name, []).append((float(bits[1]), value, low, high))
    return plot_lines(
        [Line(name, tuple(sorted(points))) for name, points in lines.items()],
        x_label="bits of weights and activations",
        y_label="classified right, %",
        description="Accuracy by bits and method",
        whole_x=True,
    )


def calibration_table(records: list[Record]) -> str:
    """Markdown: minutes of the calibration of a large network, and whether its end came out the same once more."""
    rows = [[each.quantity, f"{each.measured:.4g} {each.unit}".strip()] for each in records]
    first = records[0]
    return table(["what", "measured"], rows) + f"\n`{first.command}`: {first.item}. {made_on(first)}\n"


def build() -> dict[Path, str]:
    """The generated files with their text."""
    found = {
        TABLES / "ptq_speed.md": speed_table(read_jsonl(RESULTS / "ptq_speed.jsonl")),
        TABLES / "ptq_calibration.md": calibration_table(read_jsonl(RESULTS / "ptq_calibration.jsonl")),
        TABLES / "ptq_parts.md": ablation_table(read_jsonl(RESULTS / "ptq_parts.jsonl")),
    }
    for name in NETWORKS:
        records = read_jsonl(RESULTS / f"ptq_{name}.jsonl")
        found[TABLES / f"ptq_{name}.md"] = accuracy_table(records)
        found[ASSETS / f"ptq_{name}.svg"] = plot(records)
    return found

"""Tables and pictures of the time that attention takes on a CPU: decoding from a packed cache, and sparse prefill."""

from __future__ import annotations

from pathlib import Path

from pages.shared import ASSETS, RESULTS, TABLES, Point, device, estimate, parts, table

from tersor.bench.plots import Line, plot_lines
from tersor.bench.records import Record, read_jsonl


def speed_table(records: list[Record]) -> str:
    """Markdown: what was measured, with its spread."""
    rows = []
    for record in records:
        spread = "" if record.low is None else f"{record.low:.3g} to {record.high:.3g}"
        rows.append([record.item, record.quantity, f"{record.measured:.3g} {record.unit}", spread])
    first = records[0]
    return (
        table(["what", "quantity", "measured", "spread"], rows)
        + f"\n`{first.command}`: random weights, seed {first.seed}, medians with quartiles (times) or "
        f"95 % bootstrap intervals (ratios); {device(first)}, torch {first.versions['torch']}.\n"
    )


def speed_plot(records: list[Record], *, what: str, description: str) -> str:
    """SVG: milliseconds of one layer's attention against the number of tokens."""
    curves: dict[str, list[Point]] = {}
    for record in records:
        if record.unit != "ms":
            continue
        shape, name = parts(record)
        tokens = float(shape.split(", ")[1].split()[0].replace(",", ""))
        curves.setdefault(name, []).append((tokens, *estimate(record)))
    return plot_lines(
        [Line(name, tuple(points)) for name, points in curves.items()],
        x_label="tokens",
        y_label=f"{what} of one layer, ms",
        description=description,
        logarithmic=True,
    )


def build() -> dict[Path, str]:
    """The generated files with their text."""
    decode, prefill = read_jsonl(RESULTS / "kv_cpu.jsonl"), read_jsonl(RESULTS / "zipvl_cpu.jsonl")
    return {
        TABLES / "kv_cpu.md": speed_table(decode) + "\n![Decode attention](assets/kv_cpu.svg)\n",
        ASSETS / "kv_cpu.svg": speed_plot(
            decode, what="decode attention", description="Time of one decode attention against context length, by cache"
        ),
        TABLES / "zipvl_gpu.md": speed_table(read_jsonl(RESULTS / "zipvl_gpu.jsonl")),
        TABLES / "zipvl_cpu.md": speed_table([record for record in prefill if record.unit != "ms"]),
        ASSETS / "zipvl_cpu.svg": speed_plot(
            prefill, what="prefill attention", description="Time of one prefill attention, dense and sparse, by length"
        ),
    }

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


def most_of_a_prefill(tokens: int, shares: tuple[float, ...]) -> list[float]:
    """What a sparse prefill can gain at most, by operations: attention's part, then times faster for each share.

    A decoder of Qwen2.5-VL-7B's shape (28 query and 4 KV heads of 128, hidden 3,584, MLP 18,944); the causal half of
    the attention counts once. A share of 0 is attention for nothing.
    """
    hidden, heads, kv_heads, dim, mlp = 3584, 28, 4, 128, 18944
    linear = 2 * tokens * hidden * (2 * hidden + 2 * kv_heads * dim + 3 * mlp)
    attention = 2 * tokens * tokens * heads * dim
    probes = 2 * 128 * tokens * heads * dim  # the scores of 128 rows
    whole = linear + attention
    return [attention / whole, *(whole / (linear + attention * x**2 + (probes if x else 0)) for x in shares)]


def limits_table() -> str:
    """Markdown: `most_of_a_prefill` at three lengths."""
    shares = (0.795, 0.421, 0.286, 0.0)
    rows = []
    for tokens in (8192, 32768, 131072):
        part, *gains = most_of_a_prefill(tokens, shares)
        rows.append([f"{tokens:,}", f"{part:.0%}", *(f"{gain:.2f}" for gain in gains)])
    titles = ["tokens", "attention's part", *(f"{x:.1%} kept" for x in shares[:-1]), "attention for nothing"]
    return (
        table(titles, rows)
        + "\nTimes faster at most, by operations counted for Qwen2.5-VL-7B's decoder: arithmetic, not measured "
        "(`most_of_a_prefill` in `benchmarks/pages/speed.py`).\n"
    )


def build() -> dict[Path, str]:
    """The generated files with their text."""
    decode, prefill = read_jsonl(RESULTS / "kv_cpu.jsonl"), read_jsonl(RESULTS / "zipvl_cpu.jsonl")
    return {
        TABLES / "kv_cpu.md": speed_table(decode) + "\n![Decode attention](assets/kv_cpu.svg)\n",
        ASSETS / "kv_cpu.svg": speed_plot(
            decode, what="decode attention", description="Time of one decode attention against context length, by cache"
        ),
        TABLES / "kv_engine.md": speed_table(read_jsonl(RESULTS / "kv_engine.jsonl")),
        TABLES / "zipvl_limits.md": limits_table(),
        TABLES / "zipvl_gpu.md": speed_table(read_jsonl(RESULTS / "zipvl_gpu.jsonl")),
        TABLES / "zipvl_cpu.md": speed_table([record for record in prefill if record.unit != "ms"]),
        ASSETS / "zipvl_cpu.svg": speed_plot(
            prefill, what="prefill attention", description="Time of one prefill attention, dense and sparse, by length"
        ),
    }

"""Table and pictures of MiniCache: loss against merged pairs, and against bytes beside and with ZipCache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pages.shared import ASSETS, RESULTS, TABLES, Point, by_key, estimate, interval, names_of, parts, provenance, table

from tersor.bench.plots import Line, plot_lines
from tersor.bench.records import Record, read_jsonl
from tersor.kv.bench.merging_curves import MINICACHE, STACKED, ZIPCACHE

OVERALL = "planted facts"
FULL = "full cache"


def merging_table(records: list[Record]) -> str:
    """Markdown: recall and added loss of every cache."""
    known = by_key(records, "unit")
    rows = []
    for name in names_of(records):
        recall, ratio = known[name, OVERALL, "share"], known[name, OVERALL, "x"]
        added = known[name, "added loss", "nats per byte"]
        loss = f"{added.measured:+.4f} [{added.low:+.4f}, {added.high:+.4f}]" if name != FULL else "0"
        rows.append([name, f"{ratio.measured:.2f}", interval(recall), loss])
    titles = ["cache", "times smaller", "planted facts, % [95 %]", "added loss, nats a byte [95 %]"]
    return table(titles, rows) + "\n" + provenance(records)


def merging_plot(records: list[Record]) -> str:
    """SVG: added loss against the number of merged pairs."""
    curves: dict[str, list[Point]] = {}
    for record in records:
        name, task = parts(record)
        if task == "added loss" and name != FULL:
            way, _, count = name.rpartition(", ")
            curves.setdefault(way, []).append((float(count.split()[0]), *estimate(record)))
    return plot_lines(
        [Line(way, ((0.0, 0.0, 0.0, 0.0), *points)) for way, points in curves.items()],
        x_label="pairs of layers merged, deepest first",
        y_label="added loss, nats a byte",
        description="Loss that merging adds to a book's continuation, against the number of merged pairs of layers",
        whole_x=True,
    )


def curve(records: list[Record], family: str) -> list[Point]:
    """Compression and added loss of a family of `stacked_contenders`, from large to small."""
    known = by_key(records, "unit")
    names = [name for name, task, _ in known if task == "added loss" and family_of(name) == family]
    points = [(known[name, "continuation", "x"], known[name, "added loss", "nats per byte"]) for name in names]
    return sorted((float(ratio.measured or 0), *estimate(added)) for ratio, added in points)


def family_of(name: str) -> str:
    """The longest family name that ``name`` starts with."""
    return max((family for family in (ZIPCACHE, MINICACHE, STACKED) if name.startswith(family)), key=len, default="")


def bytes_table(records: list[Record]) -> str:
    """Markdown: added loss of both together, and of each alone at the same bytes, by linear interpolation."""
    alone = {family: curve(records, family) for family in (ZIPCACHE, MINICACHE)}
    rows = []
    for ratio, value, low, high in curve(records, STACKED):
        cells = [f"{ratio:.2f}", f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"]
        for points in alone.values():
            sizes = [point[0] for point in points]
            inside = sizes[0] <= ratio <= sizes[-1]
            there = float(np.interp(ratio, sizes, [point[1] for point in points]))
            cells.append(f"{there:+.4f}" if inside else "does not go there")
        rows.append(cells)
    titles = ["times smaller", f"{STACKED} [95 %]", f"{ZIPCACHE} alone", f"{MINICACHE} alone"]
    return table(titles, rows)


def bytes_plot(records: list[Record]) -> str:
    """SVG: added loss against compression, by family."""
    return plot_lines(
        [Line(family, tuple(curve(records, family))) for family in (ZIPCACHE, MINICACHE, STACKED)],
        x_label="compression of a 16-bit cache",
        y_label="added loss, nats a byte",
        description="Loss added to a book's continuation against compression: ZipCache, MiniCache and both together",
    )


def build() -> dict[Path, str]:
    """The generated files with their text."""
    pairs, sizes = read_jsonl(RESULTS / "merging.jsonl"), read_jsonl(RESULTS / "merging_bytes.jsonl")
    return {
        TABLES / "minicache.md": merging_table(pairs) + "\n![Added loss](assets/minicache_merging.svg)\n",
        TABLES / "minicache_bytes.md": bytes_table(sizes)
        + "\n"
        + merging_table(sizes)
        + "\n![Added loss against bytes](assets/minicache_bytes.svg)\n",
        ASSETS / "minicache_merging.svg": merging_plot(pairs),
        ASSETS / "minicache_bytes.svg": bytes_plot(sizes),
    }

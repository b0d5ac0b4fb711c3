"""Tables and pictures of ZipCache: recall, saliency, layouts of quantization parameters."""

from __future__ import annotations

from pathlib import Path

from pages.shared import (
    ASSETS,
    RESULTS,
    TABLES,
    by_key,
    estimate,
    interval,
    names_of,
    parts,
    percent,
    provenance,
    table,
)

from tersor.bench.plots import Point, plot_quality_vs_bytes
from tersor.bench.records import Record, read_jsonl
from tersor.kv.bench.tasks import TASKS

OVERALL = "planted facts"


def recall_table(records: list[Record]) -> str:
    """Markdown: one row a cache, with compression, recall overall and by task, and continuation loss."""
    known, names = by_key(records, "unit"), names_of(records)
    tasks = [task for task in TASKS if (names[0], task, "share") in known]
    has_loss = (names[0], "continuation", "nats per byte") in known
    titles = ["cache", "times smaller", "planted facts, % [95 %]", *(task.replace("_", " ") for task in tasks)]
    titles += ["continuation, nats"] if has_loss else []
    rows = []
    for name in names:
        total, ratio = known[name, OVERALL, "share"], known[name, OVERALL, "x"]
        cells = [name, f"{ratio.measured:.2f}", interval(total)]
        cells += [percent(known[name, task, "share"].measured) for task in tasks]
        if has_loss:
            cells.append(f"{known[name, 'continuation', 'nats per byte'].measured:.4f}")
        rows.append(cells)
    return table(titles, rows) + "\n" + provenance(records)


def saliency_table(records: list[Record]) -> str:
    """Markdown: accuracy of pair recall by cache."""
    known = by_key(records, "unit")
    rows = [
        [name, f"{known[name, 'pair recall', 'x'].measured:.2f}", interval(known[name, "pair recall", "share"])]
        for name in names_of(records)
    ]
    return table(["cache", "times smaller", "recall, % [95 %]"], rows) + "\n" + provenance(records)


def layout_table(records: list[Record]) -> str:
    """Markdown: loss that each layout adds, by bits and stress."""
    rows: dict[str, dict[str, Record]] = {}
    for record in records:
        layout, stress = parts(record)
        rows.setdefault(layout, {})[stress] = record
    stresses = list(next(iter(rows.values())))
    lines = [[layout, *(f"{cells[stress].measured:+.4f}" for stress in stresses)] for layout, cells in rows.items()]
    return (
        table(["layout", *stresses], lines) + "\nLoss added to the exact cache, nats per byte. " + provenance(records)
    )


def recall_plot(records: list[Record], families: dict[str, str]) -> str:
    """SVG: recall against compression."""
    known = by_key(records, "unit")
    points, full = [], None
    for name, family in families.items():
        total, ratio = known[name, OVERALL, "share"], known[name, OVERALL, "x"]
        assert ratio.measured is not None
        value, low, high = (100 * part for part in estimate(total))
        full = value if family == "full" else full
        points.append(Point(name, ratio.measured, value, low, high, family))
    return plot_quality_vs_bytes(
        points,
        x_label="compression of a 16-bit cache",
        y_label="questions answered exactly, %",
        description="Recall of facts planted in book text against compression of the KV cache, by method",
        baseline=full,
    )


def build() -> dict[Path, str]:
    """The generated files with their text."""
    from tersor.kv.bench.contenders import contenders

    recall = read_jsonl(RESULTS / "kv_agnostic.jsonl")
    layouts = [record for bits in (4, 2) for record in read_jsonl(RESULTS / f"quantizers_{bits}bit.jsonl")]
    measured = {parts(record)[0] for record in recall}
    shown = {each.name: each.family for each in contenders(with_peers=True) if each.name in measured}
    return {
        TABLES / "zipcache.md": recall_table(recall) + "\n![Recall against compression](assets/zipcache_recall.svg)\n",
        TABLES / "saliency.md": saliency_table(read_jsonl(RESULTS / "saliency.jsonl")),
        TABLES / "quantizers.md": layout_table(layouts),
        ASSETS / "zipcache_recall.svg": recall_plot(recall, shown),
    }

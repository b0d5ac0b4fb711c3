"""Tables and pictures of ZipCache: recall, saliency, layouts of quantization parameters."""

from __future__ import annotations

from pathlib import Path

from tables_shared import ASSETS, RESULTS, TABLES, interval, parts, percent, provenance

from tersor.bench.plots import Point, plot_quality_vs_bytes
from tersor.bench.records import Record, read_jsonl
from tersor.kv.bench.tasks import TASKS

OVERALL = "planted facts"


def recall_table(records: list[Record]) -> str:
    """Markdown: one row a cache, with compression, recall overall and by task, and continuation loss."""
    by_key = {(*parts(record), record.unit): record for record in records}
    names = list(dict.fromkeys(parts(record)[0] for record in records))
    tasks = [task for task in TASKS if (names[0], task, "share") in by_key]
    has_loss = (names[0], "continuation", "nats per byte") in by_key
    titles = ["cache", "times smaller", "planted facts, % [95 %]", *(task.replace("_", " ") for task in tasks)]
    titles += ["continuation, nats"] if has_loss else []
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for name in names:
        total, ratio = by_key[name, OVERALL, "share"], by_key[name, OVERALL, "x"]
        cells = [name, f"{ratio.measured:.2f}", interval(total)]
        cells += [percent(by_key[name, task, "share"].measured) for task in tasks]
        if has_loss:
            cells.append(f"{by_key[name, 'continuation', 'nats per byte'].measured:.4f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + provenance(records)


def saliency_table(records: list[Record]) -> str:
    """Markdown: accuracy of pair recall by cache."""
    by_key = {(*parts(record), record.unit): record for record in records}
    lines = ["| cache | times smaller | recall, % [95 %] |", "|---|---:|---:|"]
    for name in dict.fromkeys(parts(record)[0] for record in records):
        recall, ratio = by_key[name, "pair recall", "share"], by_key[name, "pair recall", "x"]
        lines.append(f"| {name} | {ratio.measured:.2f} | {interval(recall)} |")
    return "\n".join(lines) + "\n\n" + provenance(records)


def layout_table(records: list[Record]) -> str:
    """Markdown: loss that each layout adds, by bits and stress."""
    rows: dict[str, dict[str, Record]] = {}
    for record in records:
        layout, stress = parts(record)
        rows.setdefault(layout, {})[stress] = record
    stresses = list(next(iter(rows.values())))
    lines = ["| layout | " + " | ".join(stresses) + " |", "|---|" + "---:|" * len(stresses)]
    for layout, cells in rows.items():
        lines.append(f"| {layout} | " + " | ".join(f"{cells[stress].measured:+.4f}" for stress in stresses) + " |")
    return "\n".join(lines) + "\n\nLoss added to the exact cache, nats per byte. " + provenance(records)


def recall_plot(records: list[Record], families: dict[str, str]) -> str:
    """SVG: recall against compression."""
    by_key = {(*parts(record), record.unit): record for record in records}
    points, full = [], None
    for name, family in families.items():
        total, ratio = by_key[name, OVERALL, "share"], by_key[name, OVERALL, "x"]
        assert total.measured is not None and total.low is not None and total.high is not None
        assert ratio.measured is not None
        full = 100 * total.measured if family == "full" else full
        points.append(Point(name, ratio.measured, 100 * total.measured, 100 * total.low, 100 * total.high, family))
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

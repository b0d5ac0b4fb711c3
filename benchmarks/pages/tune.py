"""Tables of `tersor tune`: every setting at one budget on the pieces held out, and the widths that were chosen."""

from __future__ import annotations

from pathlib import Path

from pages.shared import RESULTS, TABLES, by_key, estimate, names_of, parts, percent, provenance, table

from tersor.bench.records import Record, read_jsonl

Group = tuple[str, str]


def grouped(records: list[Record]) -> dict[Group, list[Record]]:
    """Records by model and budget, as they were run."""
    groups: dict[Group, list[Record]] = {}
    for record in sorted(records, key=lambda each: (each.model, parts(each)[1])):
        groups.setdefault((record.model, parts(record)[1]), []).append(record)
    return groups


def settings_table(groups: dict[Group, list[Record]]) -> str:
    """Markdown: one row a setting, the chosen one of each model and budget first."""
    rows = []
    for (model, budget), records in groups.items():
        known = by_key(records)
        names = [name for name in names_of(records) if (name, budget, "divergence") in known]
        for name in names:
            ratio, divergence, loss, more, recall = (
                known[name, budget, quantity]
                for quantity in (
                    "compression of a 16-bit cache", "divergence", "added loss", "more than chosen", "recall",
                )
            )  # fmt: skip
            first = name == names[0]
            rows.append(
                [
                    model if first else "",
                    budget if first else "",
                    f"**{name}**" if first else name,
                    f"{ratio.measured:.2f}",
                    f"{divergence.measured:.4f}",
                    _signed(loss),
                    "" if first else _signed(more),
                    percent(recall.measured),
                ]
            )
    titles = ["model", "budget", "setting", "times smaller", "divergence", "added loss, nats a token [95 %]"]
    return table([*titles, "more than the chosen one [95 %]", "planted facts, %"], rows, names=3)


def widths_table(groups: dict[Group, list[Record]]) -> str:
    """Markdown: bits of keys and of values by layer, where they were chosen by layer, and seconds of the search."""
    rows = []
    for (model, budget), records in groups.items():
        seconds = next(each.measured for each in records if each.quantity == "time")
        bits = [
            " ".join(f"{each.measured:.0f}" for each in records if each.quantity == quantity) or "one setting for all"
            for quantity in ("key bits", "value bits")
        ]
        rows.append([model, budget, *bits, f"{seconds:.0f}"])
    return table(["model", "budget", "bits of keys, layer by layer", "bits of values", "seconds"], rows, names=4)


def _signed(record: Record) -> str:
    value, low, high = estimate(record)
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"


def build() -> dict[Path, str]:
    """The generated file with its text."""
    groups = grouped(read_jsonl(RESULTS / "tune.jsonl"))
    lines = [provenance(records) for records in groups.values()]
    return {
        TABLES / "tune.md": settings_table(groups)
        + "\nThe chosen settings, and what the search took on one thread:\n\n"
        + widths_table(groups)
        + "\n"
        + "\n".join(lines)
    }

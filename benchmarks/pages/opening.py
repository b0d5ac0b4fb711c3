"""The table of the arena's bench: what ZipAR's windows score against decoding token by token."""

from __future__ import annotations

from pathlib import Path

from pages.shared import RESULTS, TABLES, made_on, table

from tersor.bench.records import Record, read_jsonl

#: Verdict of a record -> that of the comparison.
VERDICTS = {"holds": "pass", "fails": "fail", "partly": "inconclusive"}


def score_table(records: list[Record]) -> str:
    """Markdown: a row a window and margin."""
    known = {(each.item, each.quantity): each for each in records}
    rows = []
    for record in (each for each in records if each.quantity == "score"):
        name, _, margin = record.item.partition(" against raster, margin ")
        power, needed = (
            known[record.item, quantity].measured for quantity in ("passes if equally good", "votes for 80 % power")
        )
        assert record.measured is not None and power is not None and needed is not None
        figures = [f"{record.measured:.3f}", f"{record.low:.3f}", f"{record.high:.3f}"]
        verdict = VERDICTS[record.verdict or ""]
        rows.append([name, margin, *figures, verdict, f"{record.n:,}", f"{100 * power:.0f} %", f"{needed:,.0f}"])
    first = records[0]
    titles = ["ZipAR", "margin", "score", "low", "high", "verdict", "n", "power", "n for 80 %"]
    judge = (first.peer_name or "").rpartition(" ")[2]
    return (
        table(titles, rows)
        + f"\n`{first.command}`: {first.n:,} images each, seed {first.seed}; one-sided 95 % bounds; judged by "
        f"`{judge}`, the classifier that comes with the model. {made_on(first)}\n"
    )


def build() -> dict[Path, str]:
    """The page's generated files."""
    return {TABLES / "opening.md": score_table(read_jsonl(RESULTS / "opening.jsonl"))}

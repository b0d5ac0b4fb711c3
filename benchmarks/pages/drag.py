"""The table of DragAnything: how far the entities of new scenes are from their paths, with and without its branch."""

from __future__ import annotations

from pathlib import Path

from pages.shared import RESULTS, TABLES, made_on, spread, table

from tersor.bench.records import Record, read_jsonl

OBJMC, LESS = "ObjMC", "error of motion taken away"


def motion_table(records: list[Record]) -> str:
    """Markdown: a row for all scenes and for each kind."""
    own = [record for record in records if record.system == "draganything"]
    rows = []
    for record in (each for each in own if each.quantity == OBJMC):
        assert record.baseline is not None and record.peer is not None
        name = record.item.removeprefix("scene: ") if record.item.startswith("scene") else "all"
        rows.append([name, f"{record.n}", spread(record), f"{record.baseline:.2f}", f"{record.peer:.2f}"])
    (less,) = (each for each in own if each.quantity == LESS)
    assert less.measured is not None and less.low is not None and less.high is not None
    titles = ["scenes", "number", "ObjMC with the branch, pixels of 24 [95 %]", "without", "still picture"]
    return (
        table(titles, rows)
        + f"\n`{own[0].command}`: the branch takes away {100 * less.measured:.0f} % [{100 * less.low:.0f}, "
        f"{100 * less.high:.0f}] of the error without control; the paper's takes away "
        f"{100 * float(less.claim or 0):.0f} % on VIPSeg. {made_on(own[0])}\n"
    )


def build() -> dict[Path, str]:
    """The file of this page."""
    return {TABLES / "draganything.md": motion_table(read_jsonl(RESULTS / "demo.jsonl"))}

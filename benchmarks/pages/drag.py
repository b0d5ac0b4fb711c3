"""The table of DragAnything: where entities go on a small world, by what the control maps hold."""

from __future__ import annotations

from pathlib import Path

from pages.shared import RESULTS, TABLES, made_on, table

from tersor.bench.records import Record, read_jsonl
from tersor.drag.bench.cli import BEST, LESS, POINT

#: Columns -> groups of scenes in the records.
GROUPS = {
    "all": "all", "start": "start", "together": "together", "crossing": "crossing", "camera": "camera",
    "two moved": "2 moved", "three moved": "3 moved",
}  # fmt: skip


def shown(record: Record, form: str = ".2f") -> str:
    """A figure with its interval over scenes."""
    assert record.measured is not None and record.low is not None and record.high is not None
    value, low, high = (format(each, form).replace("-", "−") for each in (record.measured, record.low, record.high))
    return f"{value} [{low}, {high}]"


def arms_table(records: list[Record]) -> str:
    """Markdown: a row for what the maps hold, a column a kind of scene."""
    known = {(record.item, record.quantity): record for record in records}
    names = [record.item.rpartition(": ")[0] for record in records if record.quantity == "ObjMC"]
    rows = []
    for name in dict.fromkeys(names):
        if (f"{name}: all", "ObjMC") not in known:
            continue
        cells = [
            shown(known[f"{name}: {group}", "ObjMC"]) if (f"{name}: {group}", "ObjMC") in known else ""
            for group in GROUPS.values()
        ]
        more = [known[f"{name}: all", quantity].measured or 0 for quantity in ("EPE", "PSNR")]
        rows.append([name, *cells, f"{more[0]:.2f}", f"{more[1]:.1f}"])
    told = "; ".join(
        f"{group} {percent(known[f'{BEST}: {group}', LESS])}"
        for group in GROUPS.values()
        if (f"{BEST}: {group}", LESS) in known
    )
    trained = [
        f"{name} {shown(known[f'{name}: over trainings', 'ObjMC'])}"
        for name in dict.fromkeys(names)
        if (f"{name}: over trainings", "ObjMC") in known
    ]
    first = records[0]
    return (
        table(["maps", *(f"ObjMC, {column}" for column in GROUPS), "EPE", "PSNR"], rows)
        + f"\n`{first.command}`: {first.n} held-out scenes, the same for every row; distances in pixels of "
        f"24, PSNR in dB; 95 % intervals over the scenes. Less ObjMC of {BEST} than of {POINT}: {told}."
        + (f" Over trainings, with 95 % t-intervals: {'; '.join(trained)}." if trained else "")
        + f" {made_on(first)}\n"
    )


def percent(record: Record) -> str:
    """A share in percent with its interval."""
    assert record.measured is not None and record.low is not None and record.high is not None
    value, low, high = (f"{100 * each:.0f}".replace("-", "−") for each in (record.measured, record.low, record.high))
    return f"{value} % [{low}, {high}]"


def build() -> dict[Path, str]:
    """The file of this page."""
    return {TABLES / "draganything.md": arms_table(read_jsonl(RESULTS / "drag.jsonl"))}

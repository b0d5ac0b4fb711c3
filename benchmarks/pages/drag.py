"""The tables of DragAnything: how far entities of new scenes are from their paths, also by what the maps hold."""

from __future__ import annotations

from pathlib import Path

from pages.shared import RESULTS, TABLES, estimate, made_on, spread, table

from tersor.bench.records import Record, read_jsonl
from tersor.drag.bench import cli as bench
from tersor.drag.bench.world import KINDS

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


def arms_table(records: list[Record]) -> str:
    """Markdown: a row for what the maps hold, a column a group of scenes."""
    known = {(record.item, record.quantity): record for record in records}
    groups = ["all", *KINDS, *(f"{count} moved" for count in (1, 2, 3))]
    names = [item.removesuffix(": all") for item, quantity in known if quantity == OBJMC and item.endswith(": all")]
    rows = [
        [
            name, *(spread(known[f"{name}: {group}", OBJMC]) for group in groups),
            *(f"{known[f'{name}: all', quantity].measured:.3g}" for quantity in ("EPE", "PSNR")),
        ]
        for name in names
    ]  # fmt: skip
    saved = "; ".join(f"{group} {whole_percent(known[f'{bench.BEST}: {group}', bench.LESS])}" for group in groups)
    trained = "; ".join(
        f"{name} {spread(known[f'{name}: over trainings', OBJMC])} ({known[f'{name}: over trainings', OBJMC].n})"
        for name in names
        if (f"{name}: over trainings", OBJMC) in known
    )
    first = records[0]
    titles = [f"{group} ({known[f'{names[0]}: {group}', OBJMC].n})" for group in groups]
    return (
        table(["maps", *titles, "EPE", "PSNR"], rows)
        + f"\n`{first.command}`. ObjMC and EPE in pixels of 24, PSNR in dB, numbers of scenes in the titles, 95 % "
        f"intervals over scenes. Less ObjMC of {bench.BEST} than of {bench.POINT}, in percent: {saved}."
        + (f" Over trainings (their number), with 95 % t-intervals: {trained}." if trained else "")
        + f" {made_on(first)}\n"
    )


def whole_percent(record: Record) -> str:
    """A share in whole percent, with its interval."""
    value, low, high = (f"{100 * part:.0f}" for part in estimate(record))
    return f"{value} [{low}, {high}]"


def build() -> dict[Path, str]:
    """The files of this page."""
    return {
        TABLES / "draganything.md": motion_table(read_jsonl(RESULTS / "demo.jsonl")),
        TABLES / "draganything_arms.md": arms_table(read_jsonl(RESULTS / "drag.jsonl")),
    }

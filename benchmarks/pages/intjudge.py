"""Tables of IntJudge: every way to train a small judge, what it is worth beside people, and the memory of a 7B one."""

from __future__ import annotations

from pathlib import Path

from pages.shared import RESULTS, TABLES, made_on, table

from tersor.bench.records import Record, read_jsonl

#: Column of the table -> quantity of the records.
SHARES = {
    "generators of the training, %": "agreement, generators of the training",
    "other generators, %": "agreement, other generators",
    "only a colour differs, %": "agreement, equal length, one colour differs",
    "grey pictures, %": "agreement, grey pictures",
    "the first place wins, %": "the answer shown first wins",
}
MASS = "log-probability of the four verdicts"
PANEL = "people's votes"
#: Cards, in GB, and how much of one is planned with.
CARDS, USED = {"24 GB": 24.0, "80 GB": 80.0}, 0.9


def shown(record: Record | None) -> str:
    """A share in percent with its interval over trainings."""
    if record is None:
        return ""
    assert record.measured is not None and record.low is not None and record.high is not None
    low, high = max(record.low, 0.0), min(record.high, 1.0)
    if low == high:
        return f"{100 * record.measured:.1f}"
    return f"{100 * record.measured:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def ways_table(records: list[Record]) -> str:
    """Markdown: a row a way."""
    own = [record for record in records if PANEL not in record.item]
    known = {(record.item, record.quantity): record for record in own}
    rows = []
    for name in dict.fromkeys(record.item for record in own):
        people, references = (
            known[name, f"pairs of the training from {kind}"].measured or 0 for kind in ("people", "references")
        )
        figures = [shown(known.get((name, quantity))) for quantity in SHARES.values()]
        counted = known[name, "pairs of the training from people"].n
        told = [f"{counted}", f"{people:.0f}", f"{references:.0f}", *figures, f"{known[name, MASS].measured:.1f}"]
        rows.append([name, *told])
    first = own[0]
    n = known[first.item, SHARES["other generators, %"]].n
    titles = ["judge", "seeds", "votes", "pairs from references", *SHARES, "log mass"]
    return (
        table(titles, rows)
        + f"\n`{first.command}`: {n:,} battles a column of agreement, of three seeds, in both orders; 95 % "
        f"intervals over the seeds, each with a world and a training of its own; one seed has none. {made_on(first)}\n"
    )


def panel_table(records: list[Record]) -> str:
    """Markdown: what the trained judge is worth beside people."""
    own = [record for record in records if PANEL in record.item]
    rows = []
    for record in own:
        assert record.measured is not None
        if record.unit == "votes":
            rows.append([record.quantity, f"{record.measured:,.0f}"])
        else:
            value = shown(record) if record.low is not None else f"{100 * record.measured:.1f}"
            rows.append([f"{record.quantity}, %", value])
    first = own[0]
    told = f"\n{first.n:,} runs, drawn from the battles of the judges above. {made_on(first)}\n"
    return table([first.item, ""], rows) + told


def memory_table(records: list[Record]) -> str:
    """Markdown: gigabytes by what they are for."""
    names = dict.fromkeys(record.item for record in records)
    kinds = list(dict.fromkeys(record.quantity for record in records))
    known = {(record.item, record.quantity): record.measured or 0.0 for record in records}
    rows = [
        [
            name.partition(": ")[0], *(f"{known[name, kind]:.1f}" for kind in kinds),
            ", ".join(card for card, size in CARDS.items() if known[name, kinds[-1]] <= USED * size) or "none",
        ]
        for name in names
    ]  # fmt: skip
    first = records[0]
    seen = first.item.partition(": ")[2]
    return table(["weights in", *(f"{kind}, GB" for kind in kinds), "fits on"], rows) + (
        f"\n`{first.command}`: {seen}; counted, not measured, and {USED:.0%} of a card is planned with.\n"
    )


def build() -> dict[Path, str]:
    """The page's generated files."""
    records = read_jsonl(RESULTS / "intjudge.jsonl")
    return {
        TABLES / "intjudge.md": ways_table(records),
        TABLES / "intjudge_panel.md": panel_table(records),
        TABLES / "intjudge_memory.md": memory_table(read_jsonl(RESULTS / "intjudge_memory.jsonl")),
    }

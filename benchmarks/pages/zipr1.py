"""Tables and the plot of ZipR1: every way to train tiny-vlm for fewer tokens, in both settings."""

from __future__ import annotations

from pathlib import Path

from pages.shared import ASSETS, RESULTS, TABLES, Point, by_key, made_on, names_of, table

from tersor.bench.plots import Line, plot_lines
from tersor.bench.records import Record, read_jsonl

RATIO, RIGHT, LOST = "tokens in attention, sparse layers", "right answers", "right answers against the start"
DENSE, RANDOM = "right answers with dense attention", "right answers from random tokens, as many"
MATTER = "kept visual tokens that matter"
#: Setting -> the table's name; the records of each are in a file of that name.
SETTINGS = {
    "every layer sparse": "zipr1", "first layer dense": "zipr1_first_dense", "a check, no answers": "zipr1_check",
}  # fmt: skip
END = "start at the "
#: Ways whose points are drawn.
DRAWN = ("start", "literal", "accuracy only", "pathwise", "entropy", "given answers + ratio")


def shown(record: Record, form: str = ".1f") -> str:
    """A share in percent with its interval over trainings; one training has none."""
    assert record.measured is not None and record.low is not None and record.high is not None
    value, low, high = (
        format(100 * each, form).replace("-", "−") for each in (record.measured, record.low, record.high)
    )
    return value if record.low == record.high else f"{value} [{low}, {high}]"


def ways_table(records: list[Record], setting: str) -> str:
    """Markdown: what became of the model in each way."""
    known = by_key([record for record in records if record.item.endswith(f": {setting}")])
    rows = []
    for name in names_of(records):
        if name.startswith(END) or (name, setting, RATIO) not in known:
            continue
        found = {quantity: known[name, setting, quantity] for quantity in (RATIO, RIGHT, LOST, DENSE, RANDOM, MATTER)}
        rows.append(
            [
                name,
                *(shown(found[quantity]) for quantity in (RATIO, RIGHT)),
                shown(found[LOST], "+.1f") if name != "start" else "",
                *(shown(found[quantity]) for quantity in (DENSE, RANDOM)),
                f"{100 * (found[MATTER].measured or 0):.2f}",
            ]
        )
    first = records[0]
    ends = [known[f"{END}{end} threshold", setting, RIGHT] for end in ("lowest", "highest")]
    titles = [
        "way", "tokens, % of the prompt", "right, %", "against the start, points", "right densely, %",
        "right from random tokens, %", "of the visual tokens kept, matter, %",
    ]  # fmt: skip
    how = (
        f"\n`{first.command}`: {setting}; {known['start', setting, RIGHT].n:,} held-out questions, a third for each of "
        f"three trainings, with 95 % intervals over the trainings; a row without intervals is one "
        f"training. Before the training the lowest threshold gives {shown(ends[0])} % right answers, "
        f"the highest sparse one {shown(ends[1])} %. {made_on(first)}\n"
    )
    return table(titles, rows) + how


def plot(records: list[Record], setting: str) -> str:
    """SVG: right answers against tokens in attention, one point a way."""
    known = by_key([record for record in records if record.item.endswith(f": {setting}")])

    def point(name: str) -> Point:
        ratio, right = known[name, setting, RATIO], known[name, setting, RIGHT]
        assert ratio.measured is not None and right.measured is not None
        assert right.low is not None and right.high is not None
        return 100 * ratio.measured, 100 * right.measured, 100 * right.low, 100 * right.high

    return plot_lines(
        [Line(name, (point(name),)) for name in DRAWN if (name, setting, RATIO) in known],
        x_label="tokens in attention, %",
        y_label="questions answered right, %",
        description=f"Right answers against tokens in attention after each way of training, {setting}",
    )


def build() -> dict[Path, str]:
    """The generated files with their text."""
    found = {setting: read_jsonl(RESULTS / f"{name}.jsonl") for setting, name in SETTINGS.items()}
    return {
        **{TABLES / f"{name}.md": ways_table(found[setting], setting) for setting, name in SETTINGS.items()},
        ASSETS / "zipr1_ways.svg": plot(found["every layer sparse"], "every layer sparse"),
    }

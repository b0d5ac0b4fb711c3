"""Tables and pictures of ZipVL: accuracy against tokens kept, the speed of its attention, and real photographs."""

from __future__ import annotations

from pathlib import Path

from pages.shared import ASSETS, RESULTS, TABLES, Point, estimate, parts, percent, points, provenance, table

from tersor.bench.plots import Line, plot_lines
from tersor.bench.records import Record, read_jsonl
from tersor.kv.bench.tiles import KINDS, MOST_COUNTED

ACCURACY, KEPT = "accuracy", "tokens in attention"


def find(records: list[Record], name: str, item: str, quantity: str) -> Record:
    """The record of one contender's ``item``."""
    return next(r for r in records if parts(r) == (name, item) and r.quantity == quantity)


def names(records: list[Record]) -> list[str]:
    """The contenders, in the order of the run."""
    return list(dict.fromkeys(parts(r)[0] for r in records if parts(r)[1] == "both kinds"))


def accuracy_table(records: list[Record]) -> str:
    """Markdown: one row a contender."""
    rows = []
    for name in names(records):
        against = find(records, name, "both kinds", "accuracy against dense")
        later = find(records, name, "next question", "accuracy against dense")
        rows.append(
            [
                name,
                f"{find(records, name, 'prompt', KEPT).measured:.3f}",
                percent(find(records, name, "prompt", "attention operations saved").measured),
                *(percent(find(records, name, kind, ACCURACY).measured) for kind in KINDS),
                points(against),
                points(later),
                f"{find(records, name, 'cache', 'compression of a 16-bit cache').measured:.2f}",
            ]
        )
    titles = ["prefill", "tokens kept", "operations saved, %", *(f"{kind}, %" for kind in KINDS)]
    titles += ["against dense, points [95 %]", "next question, points [95 %]", "times smaller"]
    return table(titles, rows) + "\n" + provenance(records)


def accuracy_plot(records: list[Record]) -> str:
    """SVG: right answers against tokens kept, for ZipVL and what chooses otherwise."""
    curves: dict[str, list[Point]] = {}
    for name in names(records):
        # With layer 0 dense all ways of choosing lie on one line.
        alike = name.startswith(("fixed", "random")) and name.endswith("layer 0 dense")
        if name.startswith("ZipVL quantize") or "raw" in name or name == "dense" or alike:
            continue
        words, _, skip = name.partition(", ")
        family = words.rpartition(" ")[0] + (f", {skip}" if skip else "")
        right, kept = find(records, name, "both kinds", ACCURACY), find(records, name, "prompt", KEPT)
        assert kept.measured is not None
        value, low, high = (100 * part for part in estimate(right))
        curves.setdefault(family, []).append((kept.measured, value, low, high))
    return plot_lines(
        [Line(family, tuple(sorted(found))) for family, found in curves.items()],
        x_label="share of tokens in attention",
        y_label="right answers, %",
        description="Right answers to questions about tiles against the share of tokens that take part in attention",
    )


def layer_table(records: list[Record]) -> str:
    """Markdown: tokens kept by layer and by question, and by the number of tiles in a picture."""
    ours = [name for name in names(records) if name.startswith("ZipVL evict") and "raw" not in name]
    layers = [r for r in records if parts(r)[0] == ours[0] and parts(r)[1].startswith("layer ")]
    asked = [*KINDS, "a count of 0", "a count of 1", f"a count of {MOST_COUNTED}"]
    rows = [
        [
            name.removeprefix("ZipVL evict "),
            *(percent(find(records, name, f"layer {layer}", KEPT).measured) for layer in range(len(layers))),
            *(percent(find(records, name, f"ratio for {question}", KEPT).measured) for question in asked),
        ]
        for name in ours
    ]
    titles = ["tau", *(f"layer {layer}, %" for layer in range(len(layers))), *(f"{question}, %" for question in asked)]
    tiles = [r for r in records if parts(r)[1].startswith("pictures of ")]
    by_tiles = [
        [parts(r)[1].split()[2], f"{100 * (r.measured or 0):.2f} [{100 * (r.low or 0):.2f}, {100 * (r.high or 0):.2f}]"]
        for r in tiles
    ]
    told = parts(tiles[0])[0].removeprefix("ZipVL evict ")
    return table(titles, rows) + "\n" + table(["tiles in the picture", f"kept at {told}, % [95 %]"], by_tiles)


def photo_table(records: list[Record]) -> str:
    """Markdown: one row a photograph."""
    rows = []
    for item in dict.fromkeys(r.item for r in records):
        kept, saved, speed = (r for r in records if r.item == item)
        rows.append(
            [
                item,
                percent(kept.measured),
                percent(saved.measured),
                f"{speed.measured:.2f} [{speed.low:.2f}, {speed.high:.2f}]",
            ]
        )
    titles = ["photograph", "tokens kept, %", "operations saved, %", "prefill, times faster [95 %]"]
    first = records[0]
    return table(titles, rows) + (
        f"\n`{first.command}`: model {first.model}; {first.machine['cpu']}, {first.machine['threads']} threads.\n"
    )


def build() -> dict[Path, str]:
    """The generated files with their text."""
    accuracy = read_jsonl(RESULTS / "zipvl.jsonl")
    return {
        TABLES / "zipvl.md": accuracy_table(accuracy),
        TABLES / "zipvl_layers.md": layer_table(accuracy),
        TABLES / "zipvl_photos.md": photo_table(read_jsonl(RESULTS / "zipvl_photos.jsonl")),
        ASSETS / "zipvl_accuracy.svg": accuracy_plot(accuracy),
    }

"""Tables and pictures of ZipVL: accuracy against tokens kept, the speed of its attention, and real photographs."""

from __future__ import annotations

from pathlib import Path

from pages.shared import ASSETS, RESULTS, TABLES, Point, estimate, parts, percent, points, provenance, table

from tersor.bench.plots import Line, plot_lines
from tersor.bench.records import Record, read_jsonl
from tersor.kv.bench.tiles import KINDS

ACCURACY, KEPT = "accuracy", "tokens in attention"
#: How the variant is called in the table; its records name the folder in which its recipe left it.
NEVER_MET = "left-out words never met"


def find(records: list[Record], name: str, item: str, quantity: str) -> Record:
    """The record of one contender's ``item``."""
    return next(r for r in records if parts(r) == (name, item) and r.quantity == quantity)


def names(records: list[Record]) -> list[str]:
    """The contenders, in the order of the run."""
    return list(dict.fromkeys(parts(r)[0] for r in records if parts(r)[1] == "all kinds"))


def accuracy_table(records: list[Record], variant: list[Record]) -> str:
    """Markdown: one row a contender, and ZipVL's on the variant that never met words that are left out."""
    rows = [accuracy_row(records, name, name) for name in names(records)]
    theirs = [name for name in names(variant) if name == "dense" or name.startswith("ZipVL evict")]
    rows += [accuracy_row(variant, name, f"{NEVER_MET}: {name}") for name in theirs]
    titles = ["prefill", "tokens kept", "operations saved, %", *(f"{kind}, %" for kind in KINDS)]
    titles += [
        "against dense, points [95 %]",
        "cells read are kept, %",
        "next question, points [95 %]",
        "times smaller",
    ]
    made = (
        f"The last rows: the model of `python recipes/tiny_vlm.py --out OUT --without-left-out`. {provenance(variant)}"
    )
    return table(titles, rows) + f"\n{provenance(records)}\n{made}"


def accuracy_row(records: list[Record], name: str, shown: str) -> list[str]:
    """One contender: what it kept, right answers, and what became of the next question."""
    cells = [
        find(records, name, f"steps of {kind}", "cells kept where they are read").measured or 0.0 for kind in KINDS
    ]
    return [
        shown,
        f"{find(records, name, 'prompt', KEPT).measured:.3f}",
        percent(find(records, name, "prompt", "attention operations saved").measured),
        *(percent(find(records, name, kind, ACCURACY).measured) for kind in KINDS),
        points(find(records, name, "all kinds", "accuracy against dense")),
        percent(sum(cells) / len(cells)),
        points(find(records, name, "next question", "accuracy against dense")),
        f"{find(records, name, 'cache', 'compression of a 16-bit cache').measured:.2f}",
    ]


def accuracy_plot(records: list[Record]) -> str:
    """SVG: right answers against tokens kept, for ZipVL and what chooses otherwise, every layer sparse."""
    curves: dict[str, list[Point]] = {}
    for name in names(records):
        words, _, skip = name.partition(", ")
        if skip or name.startswith("ZipVL quantize") or name == "dense":
            continue
        right, kept = find(records, name, "all kinds", ACCURACY), find(records, name, "prompt", KEPT)
        assert kept.measured is not None
        value, low, high = (100 * part for part in estimate(right))
        curves.setdefault(words.rpartition(" ")[0], []).append((kept.measured, value, low, high))
    return plot_lines(
        [Line(family, tuple(sorted(found))) for family, found in curves.items()],
        x_label="share of tokens in attention",
        y_label="right answers, %",
        description="Right answers to questions about tiles against the share of tokens that take part in attention",
    )


def layer_table(records: list[Record]) -> str:
    """Markdown: visual tokens kept by layer, and all tokens by question."""
    ours = [name for name in names(records) if name.startswith("ZipVL evict")]
    layers = [r for r in records if parts(r)[0] == ours[0] and parts(r)[1].startswith("layer ")]
    rows = [
        [
            name.removeprefix("ZipVL evict "),
            *(
                percent(find(records, name, f"layer {layer}", "visual tokens in attention").measured)
                for layer in range(len(layers))
            ),
            *(percent(find(records, name, f"ratio for {kind}", KEPT).measured) for kind in KINDS),
        ]
        for name in ours
    ]
    return table(["tau", *(f"layer {layer}, %" for layer in range(len(layers))), *(f"{k}, %" for k in KINDS)], rows)


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
    accuracy, variant = (read_jsonl(RESULTS / f"{name}.jsonl") for name in ("zipvl", "zipvl_never_left_out"))
    return {
        TABLES / "zipvl.md": accuracy_table(accuracy, variant),
        TABLES / "zipvl_layers.md": layer_table(accuracy),
        TABLES / "zipvl_photos.md": photo_table(read_jsonl(RESULTS / "zipvl_photos.jsonl")),
        ASSETS / "zipvl_accuracy.svg": accuracy_plot(accuracy),
    }

"""Tables and pictures of speculative decoding: what is drawn, and passes and time by batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from pages.shared import ASSETS, RESULTS, TABLES, by_key, estimate, interval, made_on, names_of, parts, spread, table

from tersor import zoo
from tersor.bench.records import Record, read_jsonl
from tersor.grids.drawing import Panel, as_png, compare_svg

SAMPLES, RASTER, SAME = "samples", "raster", "texts equal to generate's"
#: Those of `zipar_samples.json` that are shown being decoded.
MOVING = (RASTER, "speculative 28", "window 4")
HALVES = {"bfloat16": "speculative_bfloat16", "float16": "speculative_float16", "float32": "speculative_float32"}


def told(records: list[Record], what: str) -> str:
    """The command below a table, and what it did."""
    first = records[0]
    return f"\n`{first.command}`: {what}. {made_on(first)}\n"


def quality_table(records: list[Record]) -> str:
    """Markdown: what is drawn, by decoding."""
    known, rows = by_key(records), []
    names = [name for name in names_of(records) if (name, SAMPLES, "nats an image") in known]
    for name in names:
        distance = known[name, SAMPLES, "Fréchet distance"].measured
        rows.append(
            [
                name,
                spread(known[name, SAMPLES, "nats an image"]),
                interval(known[name, SAMPLES, "class accuracy"]),
                f"{distance:.3g}",
            ]
        )
    titles = ["decoding", "nats an image [95 %]", "class accuracy, % [95 %]", "Fréchet distance"]
    n = known[RASTER, SAMPLES, "class accuracy"].n
    how = f"{n} images each; nats are minus the logarithm of an image's probability in raster decoding"
    return table(titles, rows) + told(records, how)


def speed_table(records: list[Record], more: Sequence[Record] = ()) -> str:
    """Markdown: passes, tokens fed and speed by the images of a batch; ``more`` are of a run with another batch."""
    known = by_key([*records, *more])
    batches = sorted({task for _, task, _ in known if task.startswith("batch")}, key=lambda task: int(task.split()[1]))
    rows = []
    for name in [name for name in names_of(records) if (name, batches[0], "forward passes") in known]:
        row = [name]
        for task in batches:
            if (name, task, "forward passes") not in known:
                row += [""] * 4
                continue
            passes, fed = (known[name, task, quantity].measured for quantity in ("forward passes", "tokens fed"))
            rate = 1 / estimate(known[name, task, "images per second"])[0]
            row += [f"{passes:.1f}", f"{fed:.0f}", f"{int(task.split()[1]) * rate:.2f}"]
            row.append(spread(known[name, task, "speed-up over raster"]))
        rows.append(row)
    titles = ["decoding"]
    for task in batches:
        titles += [f"passes, {task}", "tokens an image", "s", "times raster's speed [95 %]"]
    n = known[RASTER, batches[0], "forward passes"].n
    last = f"; and `{more[0].command}`" if more else ""
    return table(titles, rows) + told(records, f"all in turns, {n} rounds{last}")


def paired_table(records: list[Record]) -> str:
    """Markdown: raster and speculative decoding of the same seeds."""
    known, rows = by_key(records), []
    tasks = dict.fromkeys(parts(record)[1] for record in records if parts(record)[1].startswith("batch"))
    for name in [name for name in names_of(records) if name.startswith("speculative")]:
        for task in tasks:
            found = {quantity: record for (own, at, quantity), record in known.items() if (own, at) == (name, task)}
            same = found["images equal to raster's"]
            rows.append(
                [
                    f"{name}, {task}",
                    f"{found['forward passes'].measured:.1f}",
                    f"{found['tokens fed'].measured:.0f}",
                    f"{100 * (same.measured or 0):.4g} %",
                    spread(found["speed-up over raster"]),
                ]
            )
    titles = ["decoding", "passes", "tokens an image", "images equal to raster's", "times raster's speed [95 %]"]
    rounds = next(record.n for record in records if record.quantity == "speed-up over raster")
    return table(titles, rows) + told(records, f"in turns, {rounds} rounds, the seeds of raster's")


def precision_table(by_type: dict[str, list[Record]]) -> str:
    """Markdown: how many images a near-tie changed, and whether the law stayed, by type of the weights."""
    rows = []
    for dtype, records in by_type.items():
        known = by_key(records)
        task = next(task for _, task, _ in known if task.startswith("batch"))
        same = known["speculative 28", task, "images equal to raster's"]
        nats = {
            name: known[name, SAMPLES, "nats an image"] for name in (RASTER, "speculative 28", "law speculative 28")
        }
        count = (same.n or 0) + 1  # the warm-up's images are compared too
        rows.append(
            [
                dtype,
                f"{100 * (1 - (same.measured or 0)):.3g} % of {count * int(task.split()[1])}",
                *map(spread, nats.values()),
            ]
        )
    titles = ["weights", "images that differ from raster's", "nats: raster", "nats: seed", "nats: law"]
    first = next(iter(by_type.values()))
    n = next(record.n for record in first if record.quantity == "nats an image")
    return table(titles, rows) + told(first, f"and so with the other types; nats of {n} images with 95 % intervals")


def shapes_table(records: list[Record]) -> str:
    """Markdown: the cost of a pass by its width, and what follows for an image."""
    rows = [
        [record.item, record.quantity, f"{record.measured:.3g} {record.unit}", f"{record.low:.3g} to {record.high:.3g}"]
        for record in records
        if not record.quantity.startswith("time of a pass, ")
    ]
    first = records[0]
    return table(["what", "quantity", "measured", "95 % or quartiles"], rows) + told(
        records, f"{first.shapes}; {first.n} rounds in turns"
    )


def text_table(records: list[Record]) -> str:
    """Markdown: passes on text."""
    known = {(record.item, record.quantity): record for record in records}
    rows = [
        [item, spread(record), f"{record.baseline:.0f}", f"{100 * (known[item, SAME].measured or 0):.4g} %"]
        for (item, quantity), record in known.items()
        if quantity == "forward passes"
    ]
    titles = ["text", "passes [95 %]", "of generate", "texts equal to generate's"]
    return table(titles, rows) + told(records, f"{records[0].n} texts")


def moving_picture(content: dict) -> str:
    """SVG: images being decoded."""
    tokenizer = zoo.load_image_tokenizer(content["model"])
    by_way = {each["way"]: each for each in content["drawn"]}
    panels = [
        Panel(name, by_way[name]["decided"], as_png(tokenizer.decode(torch.tensor(by_way[name]["ids"]))))
        for name in MOVING
    ]
    return compare_svg(panels, description="An image by raster, speculative decoding and ZipAR, as it is decoded")


def build() -> dict[Path, str]:
    """The generated files with their text."""
    drawn = json.loads((RESULTS / "zipar_samples.json").read_text(encoding="utf-8"))
    found = {name: read_jsonl(RESULTS / f"{name}.jsonl") for name in ("speculative", "speculative_flat")}
    halves = {dtype: read_jsonl(RESULTS / f"{file}.jsonl") for dtype, file in HALVES.items()}
    return {
        **{TABLES / f"{name}.md": quality_table(records) for name, records in found.items()},
        TABLES / "speculative_speed.md": speed_table(
            found["speculative"], read_jsonl(RESULTS / "speculative_64.jsonl")
        ),
        TABLES / "speculative_flat_speed.md": speed_table(found["speculative_flat"]),
        TABLES / "speculative_paired.md": "\n".join(
            paired_table(read_jsonl(RESULTS / f"speculative_{name}.jsonl")) for name in ("paired", "batch16")
        ),
        TABLES / "speculative_precision.md": precision_table(halves),
        TABLES / "speculative_shapes.md": shapes_table(read_jsonl(RESULTS / "speculative_shapes.jsonl")),
        TABLES / "speculative_text.md": text_table(read_jsonl(RESULTS / "speculative_text.jsonl")),
        ASSETS / "speculative_decoding.svg": moving_picture(drawn),
    }

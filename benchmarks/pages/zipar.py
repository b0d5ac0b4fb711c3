"""Tables and pictures of ZipAR: quality against passes, speed against windows, images being decoded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pages.shared import (
    ASSETS,
    RESULTS,
    TABLES,
    Point,
    by_key,
    estimate,
    interval,
    made_on,
    parts,
    percent,
    points,
    spread,
    table,
)

from tersor import zoo
from tersor.bench.plots import Line, plot_lines
from tersor.bench.records import Record, read_jsonl
from tersor.grids.drawing import Panel, as_png, compare_svg, samples_svg

RASTER, SAMPLES, ONE = "raster", "samples", "batch 1"
FAMILIES = {"window": "fixed window", "adaptive": "adaptive window", "eager": "fixed, eager row starts"}
#: Those of `zipar_samples.json` that are shown being decoded.
MOVING = (RASTER, "window 4", "adaptive 4")


def quality_table(records: list[Record]) -> str:
    """Markdown: one row a way, then the floors."""
    known, rows = by_key(records), []
    for name in decodings_of(records):
        distance, accuracy = known[name, SAMPLES, "Fréchet distance"], known[name, SAMPLES, "class accuracy"]
        rows.append(
            [
                name,
                f"{known[name, SAMPLES, 'forward passes'].measured:.4g}",
                spread(distance),
                interval(accuracy),
                points(known[name, SAMPLES, "accuracy against raster"]) if name != RASTER else "0",
            ]
        )
    for name in ("real images", "reconstructed images"):
        rows.append([f"({name})", "", spread(known[name, "floor", "Fréchet distance"]), "", ""])
    titles = [
        "decoding",
        "passes",
        "Fréchet distance [95 %]",
        "class accuracy, % [95 %]",
        "against raster, points [95 %]",
    ]
    first, floor = known[RASTER, SAMPLES, "class accuracy"], known["real images", "floor", "Fréchet distance"]
    _, reference = zoo.load_judge(first.model)
    return (
        table(titles, rows)
        + f"\n`{first.command}`: {first.n:,} images a row, in equal parts by seed; the distance is their mean, "
        "its interval by Student's t, that of accuracies by bootstrap. It is between features of a small classifier "
        f"and those of {reference.joint.n:,} held-out images; the last two rows are {floor.n:,} other real images, and "
        f"what the tokenizer makes of them. Fewer images of a seed make a distance a little larger. {made_on(first)}\n"
    )


def speed_table(records: list[Record]) -> str:
    """Markdown: passes and time at batch 1."""
    known, rows = by_key(records), []
    names = decodings_of(records)
    passes = {name: known[name, ONE, "forward passes"].measured or 0.0 for name in names}
    # The full window decodes one token a pass as raster does, in the same loop as all the others.
    full = next(name for name in names if name != RASTER and passes[name] == passes[RASTER])

    def passes_per_second(name: str) -> float:
        return passes[name] * estimate(known[name, ONE, "images per second"])[0]

    for name in names:
        rows.append(
            [
                name,
                f"{passes[name]:.4g}",
                f"{passes[RASTER] / passes[name]:.2f}",
                spread(known[name, ONE, "images per second"]),
                spread(known[name, ONE, "speed-up over raster"]),
                percent(known[name, ONE, "share of the pass ratio"].measured),
                "" if name == RASTER else percent(passes_per_second(name) / passes_per_second(full)),
            ]
        )
    titles = [
        "decoding",
        "passes",
        "times fewer",
        "images/s [quartiles]",
        "times raster's speed [95 %]",
        "of the pass ratio, %",
        f"the same beside {full}, %",
    ]
    first = known[RASTER, ONE, "images per second"]
    told = f"`{first.command}`: one image at a time, all in turns, {first.n} rounds. {made_on(first)}"
    return table(titles, rows) + f"\n{told}\n"


def shapes_table(records: list[Record]) -> str:
    """Markdown: what was measured on Emu3-8B's shape, and what follows from it."""
    rows = [
        [record.item, record.quantity, f"{record.measured:.3g} {record.unit}", f"{record.low:.3g} to {record.high:.3g}"]
        for record in records
    ]
    first = records[0]
    return (
        table(["what", "quantity", "measured", "spread"], rows)
        + f"\n`{first.command}`: {first.shapes}; medians of {first.n} rounds with quartiles, the ratio with its 95 % "
        f"bootstrap interval. {made_on(first)}\n"
    )


def decodings_of(records: list[Record]) -> list[str]:
    """Names in the order of the run."""
    return list(dict.fromkeys(parts(record)[0] for record in records if parts(record)[1] == SAMPLES))


def quality_plot(records: list[Record], quantity: str, label: str, factor: float = 1.0) -> str:
    """SVG: a quantity of the samples against passes, a line a family."""
    known = by_key(records)

    def point(name: str) -> Point:
        passes = known[name, SAMPLES, "forward passes"].measured
        assert passes is not None
        value, low, high = estimate(known[name, SAMPLES, quantity])
        return passes, factor * value, factor * low, factor * high

    lines = [Line("raster", (point(RASTER),))]
    for prefix, family in FAMILIES.items():
        found = sorted(point(name) for name in decodings_of(records) if name.startswith(prefix))
        lines += [Line(family, tuple(found))] if found else []
    return plot_lines(lines, x_label="forward passes an image", y_label=label, description=f"{label} against passes")


def speed_plot(records: list[Record]) -> str:
    """SVG: speed-up against the window, in passes and in time."""
    known = by_key(records)
    passes, times = [], []
    for name in decodings_of(records):
        if not name.startswith("window"):
            continue
        window = float(name.split()[1])
        base, own = known[RASTER, ONE, "forward passes"].measured, known[name, ONE, "forward passes"].measured
        assert base is not None and own is not None
        passes.append((window, base / own, base / own, base / own))
        times.append((window, *estimate(known[name, ONE, "speed-up over raster"])))
    return plot_lines(
        [Line("fewer passes", tuple(sorted(passes))), Line("images a second", tuple(sorted(times)))],
        x_label="window, of 14 columns",
        y_label="times raster",
        description="How many times fewer passes, and how many times as many images a second as raster, by window",
        whole_x=True,
    )


def pictures(content: dict) -> dict[Path, str]:
    """Images being decoded, and sheets of ten, by way."""
    tokenizer = zoo.load_image_tokenizer(content["model"])
    moving, sheets = [], []
    for each in content["drawn"]:
        title = each["way"]
        if title in MOVING:
            png = as_png(tokenizer.decode(torch.tensor(each["ids"])))
            moving.append(Panel(title, each["decided"], png))
        if not title.startswith("speculative"):  # its images are raster's
            sheets.append((title, as_png(tokenizer.decode(torch.tensor(each["sheet"])), columns=5)))
    return {
        ASSETS / "zipar_decoding.svg": compare_svg(
            moving, description="An image by raster and by ZipAR, as it is decoded"
        ),
        ASSETS / "zipar_samples.svg": samples_svg(sheets, description="Ten images by each way of decoding"),
    }


def build() -> dict[Path, str]:
    """The generated files with their text."""
    records = read_jsonl(RESULTS / "images.jsonl")
    speed = read_jsonl(RESULTS / "images_speed.jsonl")  # a run of its own, with nothing else on the machine
    drawn = json.loads((RESULTS / "zipar_samples.json").read_text(encoding="utf-8"))
    return {
        TABLES / "zipar.md": quality_table(records)
        + "\n![Fréchet distance against passes](assets/zipar_distance.svg)\n"
        + "\n![Class accuracy against passes](assets/zipar_accuracy.svg)\n",
        TABLES / "zipar_single.md": quality_table(read_jsonl(RESULTS / "images_single.jsonl")),
        TABLES / "zipar_speed.md": speed_table(speed) + "\n![Speed against the window](assets/zipar_speed.svg)\n",
        TABLES / "zipar_shapes.md": shapes_table(read_jsonl(RESULTS / "zipar_shapes.jsonl")),
        TABLES / "zipar_gpu.md": shapes_table(read_jsonl(RESULTS / "zipar_gpu.jsonl")),
        ASSETS / "zipar_distance.svg": quality_plot(records, "Fréchet distance", "Fréchet distance"),
        ASSETS / "zipar_accuracy.svg": quality_plot(records, "class accuracy", "class accuracy, %", 100),
        ASSETS / "zipar_speed.svg": speed_plot(speed),
        **pictures(drawn),
    }

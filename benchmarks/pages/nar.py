"""Tables and pictures of NAR: quality beside raster and PAR, speed by batch size, samples being decoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
    names_of,
    parts,
    percent,
    points,
    spread,
    table,
)

from tersor import zoo
from tersor.bench.plots import Line, plot_lines
from tersor.bench.records import Record, read_jsonl
from tersor.grids.drawing import Panel, as_png, compare_svg, one_a_pass, samples_svg
from tersor.grids.nar.bench.cli import EXCESS
from tersor.grids.nar.bench.quality import NAR, RASTER, SHOWN

SAMPLES = "samples"
#: Those whose sheets are shown; the ablations are in the table.
SHEETS = (NAR, RASTER, SHOWN["par4x"], SHOWN["single-head"])


def quality_table(records: list[Record]) -> str:
    """Markdown: one row a way, then the floors."""
    known, rows = by_key(records), []
    for name in dict.fromkeys(parts(each)[0] for each in records if parts(each)[1] == SAMPLES):
        accuracy = known[name, SAMPLES, "class accuracy"]
        rows.append(
            [
                name,
                f"{known[name, SAMPLES, 'forward passes'].measured:.4g}",
                f"{known[name, 'real samples', 'held-out loss'].measured:.3f}",
                f"{known[name, SAMPLES, 'temperature'].measured:g}, {known[name, SAMPLES, 'guidance'].measured:g}",
                spread(known[name, SAMPLES, "Fréchet distance"]),
                spread(known[name, SAMPLES, EXCESS]) if name != RASTER else "1",
                spread(known[name, SAMPLES, "Fréchet joint distance"]),
                interval(accuracy),
                points(known[name, SAMPLES, "accuracy against raster"]) if name != RASTER else "0",
            ]
        )
    for name in ("real samples", "reconstructed samples"):
        rows.append([f"({name})", "", "", "", spread(known[name, "floor", "Fréchet distance"]), *[""] * 4])
    titles = [
        "way", "passes", "held-out loss, nats a token", "temperature, guidance", "Fréchet distance [95 %]",
        "above the floor, raster's is 1 [95 %]",
        "joint with the class [95 %]", "class accuracy, % [95 %]", "against raster, points [95 %]",
    ]  # fmt: skip
    first, floor = known[RASTER, SAMPLES, "class accuracy"], known["reconstructed samples", "floor", "Fréchet distance"]
    loss = known[RASTER, "real samples", "held-out loss"]
    return (
        table(titles, rows)
        + f"\n`{first.command}`: {first.n:,} samples a row, in equal parts by seed. Distances are means over seeds "
        "with intervals by Student's t, accuracies have bootstrap intervals. The floor is the distance of "
        f"reconstructed real samples, {floor.n:,} at a time, as of a seed. Losses are of {loss.n} samples. "
        f"{made_on(first)}\n"
    )


def speed_table(records: list[Record]) -> str:
    """Markdown: samples a second by batch size, and NAR's speed-ups with what is left of the ratio of passes."""
    known = by_key(records)
    names = names_of(records)
    others = [name for name in names if name != NAR]
    titles = [
        "batch", *(f"{name}, samples/s [quartiles]" for name in names),
        *(f"times {name}'s speed [95 %] (of the ratio of passes)" for name in others),
    ]  # fmt: skip
    rows = []
    for batch in dict.fromkeys(parts(each)[1] for each in records):
        cells = [batch.removeprefix("batch ")]
        cells += [spread(known[name, batch, "samples per second"]) for name in names]
        for name in others:
            share = percent(known[name, batch, "share of the pass ratio"].measured)
            cells.append(f"{spread(known[name, batch, 'speed-up of NAR'])} ({share} %)")
        rows.append(cells)
    first = records[0]
    passes = ", ".join(f"{name} {known[name, parts(first)[1], 'forward passes'].measured:.0f}" for name in names)
    return (
        table(titles, rows)
        + f"\n`{first.command}`: all in turns, medians of {first.n} rounds, without guidance. Passes: {passes}. "
        f"{made_on(first)}\n"
    )


def speed_plot(records: list[Record]) -> str:
    """SVG: NAR's speed-ups against the batch size."""
    known = by_key(records)
    batches = sorted({int(parts(each)[1].removeprefix("batch ")) for each in records})
    lines = []
    for name in names_of(records):
        if name != NAR:
            found: list[Point] = [
                (float(batch), *estimate(known[name, f"batch {batch}", "speed-up of NAR"])) for batch in batches
            ]
            lines.append(Line(f"over {name}", tuple(found)))
    return plot_lines(
        lines,
        x_label="batch size",
        y_label="times as many samples a second",
        description="NAR's speed-up over raster and PAR by batch size",
        logarithmic=True,
    )


def shapes_table(records: list[Record]) -> str:
    """Markdown: images a second of the published shape by batch size, and NAR's gain over the other two."""
    by_way: dict[str, dict[str, Record]] = {}
    for record in records:
        way, _, batch = record.item.rpartition(", ")
        by_way.setdefault(way, {})[batch] = record
    first = records[0]
    batches = by_way[first.item.rpartition(", ")[0]]
    rows = [
        [way, f"{found['batch 1'].claim:.3g}", *(spread(found[batch]) for batch in batches)]
        for way, found in by_way.items()
    ]
    rounds = {record.command: record.n for record in records}
    runs = " and ".join(f"`{command}` ({n} rounds)" for command, n in rounds.items())
    return (
        table(["images a second, or times", "paper", *batches], rows)
        + f"\n{runs}: {first.model}, {first.shapes}; medians with quartiles, gains with 95 % bootstrap intervals. "
        f"The paper's: {first.claim_source}. {made_on(first)}\n"
    )


def captions_table(records: list[Record]) -> str:
    """Markdown: what captions ask for, and how often it is seen."""
    rows = [[record.item.removeprefix("captions: "), interval(record), percent(record.baseline)] for record in records]
    first = records[0]
    return (
        table(["asked for", "seen, % [95 %]", "seen without the caption, %"], rows)
        + f"\n`{first.command}`: {first.n:,} captions ({first.shapes}). {made_on(first)}\n"
    )


def from_right(name: str) -> bool:
    """Whether a model of the zoo decodes the rows of a grid from their last token."""
    config = json.loads((zoo.path(name) / "config.json").read_text(encoding="utf-8"))
    return len(config["grid_size"]) - 1 in config.get("flipped_axes", ())


def pictures(content: dict[str, Any]) -> dict[Path, str]:
    """Orders of decoding, and sheets by way, of clips and of captions."""
    images, clips = zoo.load_image_tokenizer("tiny-nar"), zoo.load_video_tokenizer("tiny-nar-video")
    rows = columns = 14
    by_way = {each["way"]: each for each in content["images"]}
    starts = {RASTER: [1 + row * columns for row in range(rows)], NAR: [1 + row for row in range(rows)]}
    moving = [
        Panel(name, one_a_pass(begins, columns, from_right=name == NAR and from_right("tiny-nar")),
              as_png(images.decode(torch.tensor(by_way[name]["ids"]))))
        for name, begins in starts.items()
    ]  # fmt: skip
    clip = torch.tensor(next(each for each in content["clips"] if each["way"] == NAR)["ids"])[-1:]
    frames = clips.decode(clip)[0, ::2]
    mirrored = from_right("tiny-nar-video")
    order = [
        Panel(f"frames {2 * t + 1} and {2 * t + 2}",
              one_a_pass([1 + t + row for row in range(clip.shape[2])], clip.shape[3], from_right=mirrored),
              as_png(frames[t : t + 1]))
        for t in range(clip.shape[1])
    ]  # fmt: skip
    sheets = [(name, as_png(images.decode(torch.tensor(by_way[name]["sheet"])), columns=5)) for name in SHEETS]
    shown = [
        (each["way"], as_png(clips.decode(torch.tensor(each["ids"])).flatten(0, 1), columns=8))
        for each in content["clips"]
        if each["way"] in SHEETS
    ]
    asked = [
        (each["caption"], as_png(images.decode(torch.tensor(each["ids"])), columns=5)) for each in content["captions"]
    ]
    return {
        ASSETS / "nar_decoding.svg": compare_svg(moving, description="An image by raster and by NAR, as it is decoded"),
        ASSETS / "nar_video_order.svg": compare_svg(order, description="A clip by NAR, as it is decoded"),
        ASSETS / "nar_samples.svg": samples_svg(sheets, description="Ten images by each way"),
        ASSETS / "nar_clips.svg": samples_svg(shown, description="Three clips, frame by frame"),
        ASSETS / "nar_captions.svg": samples_svg(asked, description="Ten images of each caption"),
    }


def build() -> dict[Path, str]:
    """The generated files with their text."""
    drawn = json.loads((RESULTS / "nar_samples.json").read_text(encoding="utf-8"))
    found = {TABLES / "nar_text.md": captions_table(read_jsonl(RESULTS / "nar_text.jsonl")), **pictures(drawn)}
    found[TABLES / "nar_cuda_speed.md"] = speed_table(read_jsonl(RESULTS / "nar_cuda_speed.jsonl"))
    found[TABLES / "nar_gpu.md"] = shapes_table(read_jsonl(RESULTS / "nar_gpu.jsonl"))
    for name in ("nar", "nar_video"):
        # Speed is a run of its own, with nothing else on the machine.
        speed = read_jsonl(RESULTS / f"{name}_speed.jsonl")
        found[TABLES / f"{name}.md"] = quality_table(read_jsonl(RESULTS / f"{name}.jsonl"))
        found[TABLES / f"{name}_speed.md"] = speed_table(speed) + f"\n![Speed by batch](assets/{name}_speed.svg)\n"
        found[ASSETS / f"{name}_speed.svg"] = speed_plot(speed)
    return found

"""ZipAR on tiny-raster: fewer passes, what becomes of them in time, and what it costs in the samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tersor import zoo
from tersor.bench.measure import Estimate
from tersor.bench.records import Record
from tersor.bench.report import Figure, Section
from tersor.bench.runs import DemoResult
from tersor.grids.drawing import Panel, as_png, compare_svg, samples_svg
from tersor.grids.geometry import RasterGrid
from tersor.grids.schedule import raster_passes, zipar_passes
from tersor.grids.zipar.bench.quality import RASTER, Quality, Speed, Way, sample, time_ways, ways
from tersor.kv.demos.shared import make_record, scaled

MODEL = "tiny-raster"
SYSTEM = "zipar"
SAMPLES = 300
ROUNDS = 8
SEED = 2024
#: Two thirds of 14 columns; and an adaptive window that takes about as many passes as a fixed one of 6.
WINDOW, LEAST, HASTY = 9, 4, 2
#: Share of class accuracy, in points, and of the pass ratio.
ALLOWED_LOSS, LEAST_REALIZED = 2.0, 0.8
EMU3_GRID, EMU3_WINDOW, EMU3_PASSES = RasterGrid(90, 90, end_of_row=True), 7, 713


def run(say: Callable[[str], None]) -> DemoResult:
    """Draw and time samples; ``say`` is told what is being done."""
    model: Any = zoo.load_model(MODEL)
    tokenizer, judge = zoo.load_image_tokenizer(MODEL), zoo.load_judge(MODEL)
    chosen = ways(model.config.grid_size[1], [WINDOW, HASTY], [LEAST], [])
    qualities = {}
    for way in chosen:
        say(f"{SAMPLES} images by {way.name}")
        qualities[way.name] = Quality([sample(model, tokenizer, judge, way, samples=SAMPLES, seed=SEED)])
    say("images a second, one at a time")
    speed = time_ways(model, chosen, repeats=ROUNDS, seed=SEED)
    section = Section(
        title="ZipAR: rows of an image decode in parallel",
        intro=(
            "A small class-conditional transformer draws digits on a grid of 14 by 14 tokens. A row starts when the "
            f"first tokens of the row above are there: {WINDOW} of them, or {HASTY}, or as many as it takes for its "
            "first token to be accepted (adaptive). Nothing is trained for it."
        ),
        figures=sheets(model, tokenizer, chosen),
    )
    return DemoResult(_records(qualities, speed), section)


def sheets(model: Any, tokenizer: Any, chosen: list[Way]) -> list[Figure]:
    """One image of each way being decoded, and a sheet of each."""
    panels, samples = [], []
    columns = model.config.grid_size[1]
    for way in chosen:
        generator = torch.Generator().manual_seed(SEED)
        ids, starts = way.draw(model, torch.tensor([3]), generator)
        panels.append(Panel(way.name, starts, columns, as_png(tokenizer.decode(ids))))
        ids, _ = way.draw(model, torch.arange(10), generator)
        samples.append((way.name, as_png(tokenizer.decode(ids), columns=5)))
    moving = compare_svg(panels, description="Images being decoded, token by token")
    still = samples_svg(samples, description="Samples by way of decoding")
    return [
        Figure(moving, "One image each, in the order in which its tokens are decided; all on one clock."),
        Figure(still, "Ten samples each, one a class."),
    ]


def _records(qualities: dict[str, Quality], speed: Speed) -> list[Record]:
    fixed, least, hasty = f"window {WINDOW}", f"adaptive {LEAST}", f"window {HASTY}"
    raster = qualities[RASTER]
    emu3 = zipar_passes(EMU3_GRID.rows, EMU3_GRID.columns, EMU3_WINDOW, "eol")
    loss = scaled(qualities[fixed].against(raster), 100)
    return [
        make_record(
            SYSTEM,
            "Emu3's grid",
            item=f"90 x 90 tokens, window {EMU3_WINDOW}: the schedule",
            quantity="forward passes",
            unit="passes",
            claim=float(EMU3_PASSES),
            claim_source="8,190 to 713 passes on Emu3-Gen, 91.3 % fewer (arXiv 2412.04062)",
            estimate=float(emu3),
            baseline=float(raster_passes(EMU3_GRID)),
            n=None,
            shapes="schedule only",
            seed=None,
            verdict="holds" if emu3 == EMU3_PASSES else "fails",
        ),
        make_record(
            SYSTEM,
            MODEL,
            item=f"{fixed} of 14: samples of the asked class, by a classifier",
            quantity="class accuracy against raster",
            unit="points",
            estimate=loss,
            baseline=0.0,
            peer=scaled(qualities[hasty].against(raster), 100).value,
            peer_name=hasty,
            n=len(raster.right),
            verdict=judge_loss(loss),
        ),
        make_record(
            SYSTEM,
            MODEL,
            item=f"{least}: samples of the asked class",
            quantity="class accuracy against raster",
            unit="points",
            estimate=scaled(qualities[least].against(raster), 100),
            baseline=0.0,
            n=len(raster.right),
        ),
        *(_speed_record(speed, name) for name in (fixed, least, hasty)),
    ]


def _speed_record(speed: Speed, name: str) -> Record:
    passes, raster = speed.mean_passes(name), speed.mean_passes(RASTER)
    realized = speed.realized(name)
    return make_record(
        SYSTEM,
        MODEL,
        item=f"{name}: {passes:.0f} passes instead of {raster:.0f}, one image at a time",
        quantity="images a second against raster",
        unit="x",
        estimate=speed.ratio(name),
        baseline=1.0,
        peer=raster / passes,
        peer_name="if time were passes",
        n=len(speed.passes[name]) - 1,
        verdict="holds" if realized >= LEAST_REALIZED else "partly",
    )


def judge_loss(difference: Estimate) -> str:
    """In points: "holds" if no more is lost than allowed, "partly" if the interval does not exclude that."""
    if difference.value >= -ALLOWED_LOSS:
        return "holds"
    return "partly" if difference.high >= -ALLOWED_LOSS else "fails"

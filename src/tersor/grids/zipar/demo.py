"""ZipAR and speculative decoding on tiny-raster: fewer passes, what becomes of them in time, and what they cost."""

from __future__ import annotations

from typing import Any

import torch

from tersor import zoo
from tersor.bench.records import Record
from tersor.bench.report import Figure, Section
from tersor.bench.runs import DEMO_SEED, DemoResult, OnProgress, demo_records
from tersor.bench.verdicts import judge_points, judge_speed_up
from tersor.grids.drawing import Panel, as_png, compare_svg, samples_svg
from tersor.grids.geometry import RasterGrid
from tersor.grids.samples import Quality
from tersor.grids.schedule import raster_passes, zipar_passes
from tersor.grids.zipar.bench.quality import RASTER, Decoding, Speed, decodings, sample, time_decodings

MODEL = "tiny-raster"
SYSTEM = "zipar"
SAMPLES = 300
ROUNDS = 8
#: Two thirds of 14 columns.
WINDOW = 9
#: Least distance of the adaptive window, which then takes about as many passes as a fixed window of 6.
ADAPTIVE = 4
#: A window that is too small for this model.
SMALL = 2
#: Cells of the speculative window: two rows.
TESTED = 28
#: Points of class accuracy.
ALLOWED_LOSS = 2.0
#: Share of the pass ratio that must be there in time.
LEAST_REALIZED = 0.8
#: Times raster's speed that speculative decoding must have.
LEAST_SPEED = 3.0
EMU3_GRID, EMU3_WINDOW, EMU3_PASSES = RasterGrid(90, 90, end_of_row=True), 7, 713


def run(on_progress: OnProgress) -> DemoResult:
    """Draw and time samples."""
    model: Any = zoo.load_model(MODEL)
    tokenizer, judge = zoo.load_image_tokenizer(MODEL), zoo.load_judge(MODEL)
    chosen = decodings(model.config.grid_size[1], [WINDOW, SMALL], [ADAPTIVE], [], [TESTED])
    qualities = {}
    for each in chosen[:-1]:  # those of speculative decoding are raster's
        on_progress(f"{SAMPLES} images by {each.name}")
        qualities[each.name] = Quality([sample(model, tokenizer, judge, each, samples=SAMPLES, seed=DEMO_SEED)])
    on_progress("images a second, one at a time")
    speed = time_decodings(model, chosen, repeats=ROUNDS, seed=DEMO_SEED)
    section = Section(
        title="ZipAR and speculative decoding: cells of an image decode in parallel",
        intro=(
            "A small class-conditional transformer draws digits on a grid of 14 by 14 tokens. A row starts when the "
            f"first tokens of the row above are there: {WINDOW} of them, or {SMALL}, or as many as it takes for its "
            "first token to be accepted (adaptive). Speculative decoding tests drafts of the next cells in one pass "
            "and keeps what raster decoding would draw, so its images are raster's. Nothing is trained for either."
        ),
        figures=sheets(model, tokenizer, chosen),
    )
    return DemoResult(_records(qualities, speed), section)


def sheets(model: Any, tokenizer: Any, chosen: list[Decoding]) -> list[Figure]:
    """One image being decoded, and a sheet of ten, by each decoding."""
    panels, samples = [], []
    for each in chosen:
        generator = torch.Generator().manual_seed(DEMO_SEED)
        shown = each.draw(model, torch.tensor([3]), generator)
        panels.append(Panel(each.name, shown.decided, as_png(tokenizer.decode(shown.ids))))
        sheet = each.draw(model, torch.arange(10), generator)
        samples.append((each.name, as_png(tokenizer.decode(sheet.ids), columns=5)))
    moving = compare_svg(panels, description="Images being decoded, token by token")
    still = samples_svg(samples, description="Samples by way of decoding")
    return [
        Figure(moving, "One image each, in the order in which its tokens are decided; all on one clock."),
        Figure(still, "Ten samples each, one a class."),
    ]


def _records(qualities: dict[str, Quality], speed: Speed) -> list[Record]:
    fixed, adaptive, small = f"window {WINDOW}", f"adaptive {ADAPTIVE}", f"window {SMALL}"
    raster, record = qualities[RASTER], demo_records(SYSTEM, MODEL)
    emu3 = zipar_passes(EMU3_GRID.rows, EMU3_GRID.columns, EMU3_WINDOW, "eol")
    lost = {name: qualities[name].against(raster) * 100 for name in (fixed, adaptive, small)}
    n, quantity = len(raster.right), "class accuracy against raster"
    records = [
        record(
            f"90 x 90 tokens, window {EMU3_WINDOW}: the schedule",
            "forward passes",
            "passes",
            float(emu3),
            None,
            model="Emu3's grid",
            claim=float(EMU3_PASSES),
            claim_source="8,190 to 713 passes on Emu3-Gen, 91.3 % fewer (arXiv 2412.04062)",
            baseline=float(raster_passes(EMU3_GRID)),
            shapes="schedule only",
            seed=None,
            verdict="holds" if emu3 == EMU3_PASSES else "fails",
        ),
        record(
            f"{fixed} of 14: samples of the asked class, by a classifier",
            quantity,
            "points",
            lost[fixed],
            n,
            baseline=0.0,
            peer=lost[small].value,
            peer_name=small,
            verdict=judge_points(
                lost[fixed], n, allowed=ALLOWED_LOSS, ahead=qualities[fixed].against(qualities[small])
            ),
        ),
        record(f"{adaptive}: samples of the asked class", quantity, "points", lost[adaptive], n, baseline=0.0),
    ]
    for name in (fixed, adaptive, small):
        passes, usual = speed.mean_passes(name), speed.mean_passes(RASTER)
        records.append(
            record(
                f"{name}: {passes:.0f} passes instead of {usual:.0f}, one image at a time",
                "images a second against raster",
                "x",
                speed.ratio(name),
                len(speed.passes[name]) - 1,
                baseline=1.0,
                peer=usual / passes,
                peer_name="if time were passes",
                verdict=judge_speed_up(speed.ratio(name), usual / passes, least=LEAST_REALIZED),
            )
        )
    name = f"speculative {TESTED}"
    same, passes = speed.same(name), speed.mean_passes(name)
    ratio = speed.ratio(name)
    records.append(
        record(
            f"{name}: {sum(same)} of {len(same)} images equal to raster's, {passes:.0f} passes instead of {usual:.0f}",
            "images a second against raster",
            "x",
            ratio,
            len(same) - 1,
            claim=4.2,
            claim_source="up to 4.2x, images of the raster law (MC-SJD, arXiv 2510.24211)",
            baseline=1.0,
            peer=usual / passes,
            peer_name="if time were passes",
            verdict=judge_speed_up(ratio, LEAST_SPEED, least=1.0) if all(same) else "fails",
        )
    )
    return records

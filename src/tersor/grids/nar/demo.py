"""NAR on tiny-nar, tiny-nar-text and tiny-nar-video: fewer passes, what they are in time, and what the samples show."""

from __future__ import annotations

from typing import Any

import torch

from tersor import zoo
from tersor.bench.measure import Estimate
from tersor.bench.records import Record
from tersor.bench.report import Figure, Section
from tersor.bench.runs import DEMO_SEED, DemoResult, OnProgress, demo_records
from tersor.bench.verdicts import HOLDS, PARTLY, judge_above, judge_points, judge_speed_up
from tersor.grids.drawing import as_png, samples_svg
from tersor.grids.geometry import front_count
from tersor.grids.nar.bench.quality import (
    NAR,
    RASTER,
    SHOWN,
    Decoding,
    Settings,
    Speed,
    decodings,
    sample,
    score_captions,
    time_decodings,
)
from tersor.grids.nar.captions import Captions, caption
from tersor.grids.nar.pipeline import NARPipeline
from tersor.grids.samples import Quality

IMAGES, CLIPS, TEXT, SYSTEM = "tiny-nar", "tiny-nar-video", "tiny-nar-text", "nar"
PAR = SHOWN["par4x"]
SAMPLES, CLIP_SAMPLES, ROUNDS = 100, 60, 4
#: Of the benchmark's choices, the one that suits all of these models; see the documentation.
SETTINGS = Settings(temperature=0.95, guidance=1.2)
#: Points of class accuracy, and share of the ratio of passes.
ALLOWED_LOSS, LEAST_REALIZED = 3.0, 0.8


def run(on_progress: OnProgress) -> DemoResult:
    """Draw and time samples."""
    records, sheets = [_passes()], []
    for name, samples in ((IMAGES, SAMPLES), (CLIPS, CLIP_SAMPLES)):
        network: Any = zoo.load_model(name)
        chosen = [each for each in decodings(network, zoo.load_compared(name)) if each.name in (NAR, RASTER, PAR)]
        tokenizer: Any = zoo.load_video_tokenizer(name) if name == CLIPS else zoo.load_image_tokenizer(name)
        judge = zoo.load_judge(zoo.judge_of(name))
        qualities = {}
        for each in chosen:
            on_progress(f"{name}: {samples} samples by {each.name}")
            found = sample(each, tokenizer, judge, SETTINGS, samples=samples, seed=DEMO_SEED)
            qualities[each.name] = Quality([found])
        on_progress(f"{name}: samples a second, one at a time")
        speed = time_decodings(chosen, batch=1, repeats=ROUNDS, seed=DEMO_SEED)
        records += [_quality_record(name, qualities), *(_speed_record(name, speed, each.name) for each in chosen[1:])]
        sheets += _sheets(name, chosen, tokenizer)
    on_progress(f"{TEXT}: pictures of captions")
    record, sheet = _captions()
    section = Section(
        title="NAR: from neighbour to neighbour",
        intro=(
            "Small transformers draw digits on a grid of 14 by 14 tokens, and moving digits on one of 4 by 7 by 7. "
            "All cells at one distance from the first corner are decided in one pass. Raster and PAR-4X "
            "have the same backbone and were trained by the same recipe for as long. Distances to real samples "
            "take more samples than a demo draws; they are in the documentation."
        ),
        figures=[
            Figure(samples_svg(sheets, description="Samples by model and way"), "Ten samples each, one a class; of "
                   "clips the first frame."),
            Figure(sheet, "Pictures of captions."),
        ],
    )  # fmt: skip
    return DemoResult([*records, record], section)


def _passes() -> Record:
    grid, claimed = (16, 16), 31
    passes = front_count(grid)
    return demo_records(SYSTEM, "ImageNet's grid")(
        "16 x 16 tokens: the schedule",
        "forward passes",
        "passes",
        float(passes),
        None,
        claim=float(claimed),
        claim_source="31 passes instead of 256 (arXiv 2503.10696)",
        baseline=256.0,
        peer=67.0,
        peer_name=PAR,
        shapes="schedule only",
        seed=None,
        verdict="holds" if passes == claimed else "fails",
    )


def _quality_record(model: str, qualities: dict[str, Quality]) -> Record:
    lost = {name: each.against(qualities[RASTER]) * 100 for name, each in qualities.items()}
    other = qualities.get(PAR)
    return demo_records(SYSTEM, model)(
        "samples of the asked class, by a classifier; equal steps of training",
        "class accuracy against raster",
        "points",
        lost[NAR],
        len(qualities[NAR].right),
        baseline=0.0,
        peer=None if other is None else lost[PAR].value,
        peer_name=None if other is None else PAR,
        verdict=judge_loss(
            lost[NAR], None if other is None else qualities[NAR].against(other) * 100, len(qualities[NAR].right)
        ),
    )


def judge_loss(lost: Estimate, ahead: Estimate | None, n: int) -> str:
    """In points: `judge_at_least` of no more lost than allowed; "partly" at best where PAR is clearly better."""
    verdict = judge_points(lost, n, allowed=ALLOWED_LOSS)
    return PARTLY if verdict == HOLDS and ahead is not None and ahead.high < 0 else verdict


def _speed_record(model: str, speed: Speed, other: str) -> Record:
    passes, own = speed.passes[other], speed.passes[NAR]
    return demo_records(SYSTEM, model)(
        f"{own} passes instead of {other}'s {passes}, one sample at a time",
        f"samples a second against {other}",
        "x",
        speed.over(other),
        ROUNDS,
        baseline=1.0,
        peer=passes / own,
        peer_name="if time were passes",
        verdict=judge_speed_up(speed.over(other), passes / own, least=LEAST_REALIZED),
    )


def _sheets(model: str, chosen: list[Decoding], tokenizer: Any) -> list[tuple[str, bytes]]:
    found = []
    for each in chosen:
        pixels = tokenizer.decode(each.draw(torch.arange(10), torch.Generator().manual_seed(DEMO_SEED), SETTINGS))
        found.append((f"{model}: {each.name}", as_png(pixels if pixels.ndim == 4 else pixels[:, 0], columns=5)))
    return found


def _captions() -> tuple[Record, str]:
    model: Any = zoo.load_model(TEXT)
    pipeline = NARPipeline(model, zoo.load_image_tokenizer(TEXT), zoo.load_text_encoder(TEXT))
    (classifier, _), borders = zoo.load_judge(zoo.judge_of(TEXT)), Captions.load(zoo.path(TEXT))

    def shares(captioned: bool) -> Estimate:
        scores = score_captions(
            pipeline, classifier, borders, SETTINGS, samples=SAMPLES, seed=DEMO_SEED, captioned=captioned
        )
        return scores.share("all") * 100

    asked = [caption(digit, stroke, side) for digit, stroke, side in ((7, 2, 0), (7, 0, 2), (3, 2, 1), (3, 0, 1))]
    generator = torch.Generator().manual_seed(DEMO_SEED)
    options: dict[str, Any] = {
        "temperature": SETTINGS.temperature,
        "guidance_scale": SETTINGS.guidance,
        "output_type": "pt",
    }
    drawn = [(each, pipeline(prompt=[each] * 10, generator=generator, **options).images) for each in asked]
    sheet = samples_svg([(each, as_png(images, columns=5)) for each, images in drawn], description="By caption")
    return _caption_record(shares(True), shares(False)), sheet


def _caption_record(captioned: Estimate, chance: Estimate) -> Record:
    """Captions against pictures drawn without one: chance must be excluded."""
    return demo_records(SYSTEM, TEXT)(
        'captions such as "a thick seven slanted left": digit, stroke and slant',
        "all three as asked",
        "%",
        captioned,
        SAMPLES,
        baseline=chance.value,
        verdict=judge_above(captioned, chance),
    )

"""DragAnything on tiny-drag: entities of new scenes moved along their paths, beside the same model without control."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.flop_counter import FlopCounterMode

from tersor.bench.measure import Estimate, bootstrap_difference, bootstrap_interval
from tersor.bench.records import Record
from tersor.bench.report import Figure, Section
from tersor.bench.runs import DEMO_SEED, DemoResult, OnProgress, demo_records
from tersor.bench.verdicts import judge_at_least
from tersor.drag.bench.evaluation import error_taken_away
from tersor.drag.bench.world import KINDS, SIDE, Sample, World

if TYPE_CHECKING:
    from tersor.drag.bench.table import Outcome
    from tersor.drag.pipeline import DragAnythingPipeline

MODEL = "tiny-drag"
#: Scenes, as many of each kind.
SCENES = 40
#: Denoising steps of a video.
PASSES = 10
#: The paper's ObjMC with and without the branch, on VIPSeg (Table 2 and section 4.4's first row).
WITH, WITHOUT = 305.7, 410.7


def run(on_progress: OnProgress) -> DemoResult:
    """Make the videos; ``on_progress`` is told what is being done."""
    from tersor.drag.bench.arms import videos
    from tersor.drag.bench.pictures import side_by_side
    from tersor.drag.bench.table import outcome
    from tersor.drag.loading import load_pipeline

    pipe = load_pipeline(MODEL)
    base = pipe.base()
    samples = [World(SCENES, DEMO_SEED).sample(index) for index in range(SCENES)]
    on_progress(f"{MODEL}: {SCENES} videos along their paths")
    dragged = videos(pipe, samples, steps=PASSES, seed=DEMO_SEED)
    on_progress(f"{MODEL}: the same without control")
    free = videos(base, samples, steps=PASSES, seed=DEMO_SEED)
    still = [np.repeat(sample.clip.frames[:1] / 255, len(sample.clip.frames), 0) for sample in samples]
    rows = {name: outcome(samples, made) for name, made in (("drag", dragged), ("free", free), ("still", still))}
    shown = samples[: len(KINDS)]
    rows_shown = {
        "asked for": [sample.clip.frames / 255 for sample in shown],
        "with the branch": dragged[: len(shown)],
        "without": free[: len(shown)],
    }
    section = Section(
        title="DragAnything: entities along paths",
        intro=(
            f"A Stable Video Diffusion of real classes, {SIDE} by {SIDE} pixels small, and a control branch that was "
            f"trained beside it, make {SCENES} clips of a world of textured layers that it was not trained on. It "
            "knows this world alone, and is no video model."
        ),
        figures=[Figure(side_by_side(shown, rows_shown, "Clips asked for, with the branch, and without"),
                        "A scene of each kind: " + "; ".join(f"{name}, {what}" for name, what in KINDS.items()) + ".")],
    )  # fmt: skip
    return DemoResult(_records(samples, rows, operations(pipe, samples[0])), section)


def operations(pipe: DragAnythingPipeline, sample: Sample) -> float:
    """Multiplications of a video with the branch, in those of one without."""
    from tersor.drag.bench.arms import videos

    counts = []
    for each in (pipe, pipe.base()):
        with FlopCounterMode(display=False) as counter:
            videos(each, [sample], steps=PASSES, seed=0)
        counts.append(counter.get_total_flops())
    return float(counts[0] / counts[1])


def judge(less: Estimate, than_still: Estimate) -> str:
    """The verdict: the branch takes away the paper's share of the error, and errs less than a still picture.

    Args:
        less: Share of the error without control that the branch takes away.
        than_still: Pixels by which a still picture errs more.
    """
    return judge_at_least(less, 1 - WITH / WITHOUT, nothing=0.0, ahead=than_still)


def _records(samples: list[Sample], rows: dict[str, Outcome], cost: float) -> list[Record]:
    record: Any = demo_records("draganything", MODEL)
    drag, free, still = (rows[name] for name in ("drag", "free", "still"))
    less, item = error_taken_away(drag.objmc, free.objmc), "entities along paths"
    found = [
        record(
            item, "error of motion taken away", "share", less, SCENES, claim=1 - WITH / WITHOUT,
            claim_source=f"ObjMC {WITH} against {WITHOUT} of SVD alone, VIPSeg (arXiv 2403.07420, section 4)",
            baseline=0.0, peer=error_taken_away(still.objmc, free.objmc).value, peer_name="still picture",
            verdict=judge(less, bootstrap_difference(still.objmc, drag.objmc)),
        ),
        record(
            item, "ObjMC", "pixels", bootstrap_interval(drag.objmc), SCENES, baseline=float(np.mean(free.objmc)),
            peer=float(np.mean(still.objmc)), peer_name="still picture",
        ),
        record(item, "operations of a video", "x", cost, 1, baseline=1.0),
    ]  # fmt: skip
    for kind in KINDS:
        places = [place for place, sample in enumerate(samples) if sample.kind == kind]
        own, other, none = ([row.objmc[place] for place in places] for row in (drag, free, still))
        found.append(
            record(
                f"scene: {kind}", "ObjMC", "pixels", bootstrap_interval(own), len(places),
                baseline=float(np.mean(other)), peer=float(np.mean(none)), peer_name="still picture",
            )
        )  # fmt: skip
    return found

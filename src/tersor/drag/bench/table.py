"""The paper's ablation on the world: every arm trained from several seeds, on scenes that none was trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tersor._weights import fingerprint
from tersor.bench.measure import Estimate, bootstrap_interval
from tersor.bench.runs import Finished, OnProgress
from tersor.drag.bench.arms import new_arm, videos
from tersor.drag.bench.evaluation import error_taken_away, motion_of
from tersor.drag.bench.world import KINDS, Sample, World, with_plain
from tersor.drag.data import Clip
from tersor.drag.training import DragTraining, train

#: Rows that nothing was trained for: the true video, its first frame all the time, and the base alone.
TRUE, STILL, NONE = "the true video", "still picture", "no control"
#: Seeds of the scenes to train on and of those held out.
TRAINED_ON, HELD_OUT = 11, 777


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One training of a branch on the world, and how its videos are made.

    Args:
        updates: Of the weights.
        clips: Different clips.
        batch_size: Clips of an update.
        learning_rate: The highest one.
        loss_mask: See `masked_loss`.
        sigma_log_mean: Of the noise; above that of the base, since where things go is decided while noise is strong.
        sigma_log_std: Its standard deviation.
        passes: Denoising steps of a video.
    """

    updates: int = 200
    clips: int = 3000
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    loss_mask: str = "none"
    sigma_log_mean: float = 1.0
    sigma_log_std: float = 1.4
    passes: int = 10

    def training(self, seed: int) -> DragTraining:
        """The settings of a training."""
        return DragTraining(
            max_train_steps=self.updates, train_batch_size=self.batch_size, learning_rate=self.learning_rate,
            lr_scheduler="cosine", lr_warmup_steps=min(50, self.updates // 10), loss_mask=self.loss_mask,
            entity_dropout=0.0, conditioning_dropout_prob=0.0, sigma_log_mean=self.sigma_log_mean,
            sigma_log_std=self.sigma_log_std, checkpointing_steps=100, seed=seed,
        )  # fmt: skip


@dataclass
class Outcome:
    """What became of the scenes in one row, in their order.

    Args:
        objmc: Mean distance of the layers to their paths in pixels.
        epe: The same without the first frame, where a layer is seen.
        psnr: Of the video against the true one, in dB.
    """

    objmc: list[float]
    epe: list[float]
    psnr: list[float]


def outcome(samples: Sequence[Sample], made: Sequence[np.ndarray]) -> Outcome:
    """Measure videos of some samples."""
    found = Outcome([], [], [])
    for sample, video in zip(samples, made, strict=True):
        motion = motion_of(sample, video)
        error = float(((video - sample.clip.frames / 255) ** 2).mean())
        found.objmc.append(motion.objmc_mean)
        found.epe.append(motion.epe)
        found.psnr.append(-10 * math.log10(max(error, 1e-6)))
    return found


@dataclass(frozen=True)
class Job:
    """Which table a progress file belongs to."""

    plan: Plan
    scenes: int
    weights: str


def run_table(
    svd: Any,
    model: Path,
    plan: Plan,
    arms: Sequence[str],
    seeds: Sequence[int],
    *,
    scenes: int,
    progress: Path | None,
    on_progress: OnProgress = lambda name: None,
) -> tuple[list[Sample], dict[str, Outcome]]:
    """Train and measure; ``"<row> / <seed>"`` -> what came of it.

    Args:
        svd: The base, a pipeline of the world's size.
        model: Its folder.
        plan: The trainings.
        arms: Of `ARMS`.
        seeds: Of the trainings.
        scenes: Held-out scenes, the same for every row.
        progress: A file that keeps what is done; None keeps nothing.
        on_progress: Told what is being done.

    Returns:
        The scenes, and the rows.
    """
    finished = Finished(progress, Job(plan, scenes, fingerprint(model / "unet")), lambda kept: Outcome(**kept))
    samples = [World(scenes, HELD_OUT).sample(index) for index in range(scenes)]
    clips: list[Clip] = []

    def trained(arm: str, seed: int) -> Outcome:
        if not clips:
            world = World(plan.clips, TRAINED_ON)
            clips.extend(with_plain([world[index] for index in range(plan.clips)], TRAINED_ON))
        pipe = new_arm(svd, arm, name=model.name, seed=seed)
        with TemporaryDirectory() as folder:
            train(
                pipe, clips, plan.training(seed), Path(folder) / "run",
                on_step=lambda step, steps, loss: on_progress(f"{arm}, seed {seed}: {step} of {steps}"),
            )  # fmt: skip
        pipe.controlnet.eval()
        on_progress(f"{arm}, seed {seed}: {scenes} videos")
        return outcome(samples, videos(pipe, samples, steps=plan.passes, seed=seed))

    true = [sample.clip.frames / 255 for sample in samples]
    finished.once(f"{TRUE} / 0", lambda: outcome(samples, true))
    finished.once(f"{STILL} / 0", lambda: outcome(samples, [np.repeat(each[:1], len(each), 0) for each in true]))
    on_progress(f"{NONE}: {scenes} videos")
    finished.once(f"{NONE} / 0", lambda: outcome(samples, videos(svd, samples, steps=plan.passes, seed=0)))
    for seed in seeds:
        for arm in arms:
            finished.once(f"{arm} / {seed}", lambda arm=arm, seed=seed: trained(arm, seed))  # type: ignore[misc]
    return samples, finished.results


def groups(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Places of the samples in each group that the table tells apart: all, by kind, by number of entities."""
    found = {"all": [*range(len(samples))]}
    for kind in KINDS:
        found[kind] = [place for place, each in enumerate(samples) if each.kind == kind]
    for count in (1, 2, 3):
        found[f"{count} moved"] = [place for place, each in enumerate(samples) if len(each.clip.numbers()) == count]
    return {name: places for name, places in found.items() if places}


def trainings(rows: dict[str, Outcome], name: str) -> list[Outcome]:
    """One row's trainings."""
    return [row for key, row in rows.items() if _name(key) == name]


def over_seeds_of(rows: dict[str, Outcome], name: str, measure: str) -> np.ndarray:
    """One row's figures, ``[scenes]``: of each scene the mean over the trainings."""
    mean: np.ndarray = np.mean([getattr(row, measure) for row in trainings(rows, name)], axis=0)
    return mean


def names(rows: dict[str, Outcome]) -> list[str]:
    """The rows, without their seeds."""
    return list(dict.fromkeys(map(_name, rows)))


def _name(key: str) -> str:
    return key.rsplit(" / ", 1)[0]


def figure(rows: dict[str, Outcome], name: str, measure: str, places: Sequence[int]) -> Estimate:
    """The mean of one row over some scenes, with its interval over the scenes."""
    return bootstrap_interval(over_seeds_of(rows, name, measure)[[*places]])


def against(rows: dict[str, Outcome], name: str, other: str, measure: str, places: Sequence[int]) -> Estimate:
    """How much less one row errs than another on the same scenes, as a share of the other's error."""
    own, theirs = (over_seeds_of(rows, each, measure)[[*places]].tolist() for each in (name, other))
    return error_taken_away(own, theirs)

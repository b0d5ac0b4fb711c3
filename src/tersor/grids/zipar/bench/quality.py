"""Images a second and the quality of samples, by the way in which a raster model is decoded.

Quality: the share of samples that a classifier takes for the class that was asked for, and the Fréchet distance of its
features to those of real images. Speed: all ways in turns, one image at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor import _atomic
from tersor.bench.measure import (
    Estimate,
    PairedTimes,
    bootstrap_difference,
    bootstrap_interval,
    over_seeds,
    time_paired,
)
from tersor.grids.judge import DigitClassifier, Reference
from tersor.grids.llamagen import LlamaGen
from tersor.grids.pixels import ImageTokenizer
from tersor.grids.zipar.generation import zipar_generate

RASTER = "raster"
#: Sampling as it was trained: the model's own distribution, without cut or guidance.
SAMPLING: dict[str, Any] = {"do_sample": True, "top_k": 0, "guidance_scale": 1.0}
#: Images at once. With the adaptive window the rows of a batch start together, so a way may have fewer.
BATCH, ADAPTIVE_BATCH = 100, 50


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to decode; ``window`` None is the model's own raster decoding. ``batch``: images at once for quality."""

    name: str
    family: str
    window: int | None = None
    adaptive: bool = False
    row_start: str = "auto"
    batch: int = BATCH

    def draw(self, model: LlamaGen, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, list[int]]:
        """Ids ``[batch, rows, columns]`` for classes ``[batch]``, and the pass that decides each row's first token."""
        rows, columns = model.config.grid_size
        if self.window is None:
            ids = model.generate(labels, generator=generator, **SAMPLING)
            return ids.view(-1, rows, columns), [1 + row * columns for row in range(rows)]
        out: Any = zipar_generate(
            model,
            labels,
            window_size=self.window,
            adaptive=self.adaptive,
            row_start=self.row_start,
            generator=generator,
            return_dict_in_generate=True,
            **SAMPLING,
        )
        return out.sequences.view(-1, rows, columns), out.row_start_pass


def ways(
    columns: int,
    windows: Sequence[int],
    adaptive: Sequence[int],
    eager: Sequence[int],
    *,
    adaptive_batch: int = ADAPTIVE_BATCH,
) -> list[Way]:
    """Raster, then fixed windows from large to small, the adaptive ones, and those with eager row starts.

    ``adaptive_batch``: images that the adaptive window decodes at once when quality is measured.

    Raises:
        ValueError: for a window that is not from 1 to ``columns``.
    """
    if bad := [each for each in (*windows, *adaptive, *eager) if not 1 <= each <= columns]:
        raise ValueError(f"windows {bad} must be from 1 to the grid's {columns} columns")
    fixed = [Way(name=f"window {each}", family="fixed", window=each) for each in sorted(windows, reverse=True)]
    least = [
        Way(name=f"adaptive {each}", family="adaptive", window=each, adaptive=True, batch=adaptive_batch)
        for each in sorted(adaptive, reverse=True)
    ]
    hasty = [
        Way(name=f"eager {each}", family="eager", window=each, row_start="eager")
        for each in sorted(eager, reverse=True)
    ]
    return [Way(name=RASTER, family=RASTER), *fixed, *least, *hasty]


@dataclass(frozen=True)
class Plan:
    """What a run of the benchmark does; part of its resume file."""

    model: str
    ways: tuple[Way, ...]
    samples: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Samples:
    """What one way and seed gave.

    Args:
        right: 1 for each sample that is taken for its class, else 0.
        distance: Fréchet distance of all samples to the real images.
        joint: Fréchet joint distance, of samples with their classes.
        passes: forward passes of each batch.
    """

    right: list[int]
    distance: float
    joint: float
    passes: list[int]


@dataclass(frozen=True)
class Quality:
    """One way over all seeds."""

    seeds: list[Samples]

    @property
    def right(self) -> list[int]:
        """Of all seeds, in their order."""
        return [each for samples in self.seeds for each in samples.right]

    def accuracy(self) -> Estimate:
        """Share of samples that are taken for their class, with its 95 % bootstrap interval."""
        return bootstrap_interval(self.right, n_boot=2000)

    def against(self, other: Quality) -> Estimate:
        """Difference of accuracies; sample by sample, because both were asked for the same classes."""
        return bootstrap_difference(self.right, other.right, n_boot=2000)

    def distance(self) -> Estimate:
        """Mean Fréchet distance with its 95 % interval over seeds."""
        return over_seeds([each.distance for each in self.seeds])

    def joint(self) -> Estimate:
        """Mean Fréchet joint distance with its 95 % interval over seeds."""
        return over_seeds([each.joint for each in self.seeds])

    def passes(self) -> float:
        """Mean over batches."""
        return float(np.mean([each for samples in self.seeds for each in samples.passes]))


def sample(
    model: LlamaGen,
    tokenizer: ImageTokenizer,
    judge: tuple[DigitClassifier, Reference],
    way: Way,
    *,
    samples: int,
    seed: int,
) -> Samples:
    """Draw ``samples`` images, the classes in turns, and judge them; a pure function of its arguments."""
    classifier, reference = judge
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % model.config.num_classes
    features, right, passes = [], [], []
    for part in labels.split(way.batch):
        ids, starts = way.draw(model, part, generator)
        found, guesses = classifier.judge(tokenizer.decode(ids))
        features.append(found)
        right += (guesses == part).int().tolist()
        passes.append(starts[-1] + model.config.grid_size[1] - 1)
    every = torch.cat(features)
    return Samples(right, reference.distance(every), reference.joint_distance(every, labels), passes)


def run_plan(
    plan: Plan,
    model: LlamaGen,
    tokenizer: ImageTokenizer,
    judge: tuple[DigitClassifier, Reference],
    progress: Path | None,
) -> Iterator[tuple[str, Quality]]:
    """Yield ``(way, quality)``; what is finished is kept in ``progress`` and not drawn again.

    Raises:
        ValueError: if ``progress`` belongs to another plan.
    """
    done = read_progress(progress, plan)
    for way in plan.ways:
        for seed in plan.seeds:
            key = f"{way.name}/{seed}"
            if key not in done:
                done[key] = sample(model, tokenizer, judge, way, samples=plan.samples, seed=seed)
                write_progress(progress, plan, done)
        yield way.name, Quality([done[f"{way.name}/{seed}"] for seed in plan.seeds])


def read_progress(file: Path | None, plan: Any) -> dict[str, Samples]:
    """What a run of the same ``plan``, a dataclass, has left in its resume file; `ValueError` for another plan's."""
    if file is None or not file.is_file():
        return {}
    state = json.loads(file.read_text(encoding="utf-8"))
    if state["plan"] != json.loads(json.dumps(asdict(plan))):
        raise ValueError(f"{file} belongs to a run with other settings; remove it, or repeat those settings to resume")
    return {key: Samples(**each) for key, each in state["done"].items()}


def write_progress(file: Path | None, plan: Any, done: dict[str, Samples]) -> None:
    """Keep what is done so far, if there is a ``file`` for it."""
    if file is not None:
        results = {key: asdict(each) for key, each in done.items()}
        _atomic.write_text(file, json.dumps({"plan": asdict(plan), "done": results}))


@dataclass(frozen=True)
class Speed:
    """All ways in turns, one image at a time: seconds, and passes of each image by way."""

    times: PairedTimes
    passes: dict[str, list[int]]

    def ratio(self, name: str) -> Estimate:
        """How many times as fast as raster."""
        return self.times.ratio(RASTER, name, n_boot=2000)

    def images_per_second(self, name: str) -> Estimate:
        """Median with quartiles."""
        seconds = self.times.seconds(name)
        return Estimate(1 / seconds.value, 1 / seconds.high, 1 / seconds.low, seconds.interval)

    def mean_passes(self, name: str) -> float:
        """Of one image."""
        return float(np.mean(self.passes[name]))

    def realized(self, name: str) -> float:
        """Share of the ratio of passes that is there in time."""
        return self.ratio(name).value * self.mean_passes(name) / self.mean_passes(RASTER)


def time_ways(model: LlamaGen, chosen: Sequence[Way], *, repeats: int, seed: int) -> Speed:
    """Time each way ``repeats`` times, in turns, at batch 1; the classes follow each other."""
    passes: dict[str, list[int]] = {way.name: [] for way in chosen}

    def one(way: Way) -> Callable[[], None]:
        def call() -> None:
            number = len(passes[way.name])
            generator = torch.Generator().manual_seed(seed + number)
            _, starts = way.draw(model, torch.tensor([number % model.config.num_classes]), generator)
            passes[way.name].append(starts[-1] + model.config.grid_size[1] - 1)

        return call

    times = time_paired({way.name: one(way) for way in chosen}, repeats=repeats, seed=seed)
    return Speed(times, passes)

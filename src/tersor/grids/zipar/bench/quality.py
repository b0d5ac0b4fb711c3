"""Images a second and the quality of samples, by how a raster model is decoded.

Quality: the share of samples that a classifier takes for the class that was asked for, and the Fréchet distance of its
features to those of real images. Speed: all decodings in turns, one image at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor._errors import TersorError
from tersor.bench.measure import Estimate, PairedTimes, time_paired
from tersor.bench.runs import Finished
from tersor.grids.llamagen import LlamaGen
from tersor.grids.pixels import ImageTokenizer
from tersor.grids.samples import Judge, Quality, Samples, rate
from tersor.grids.zipar.generation import zipar_generate

RASTER = "raster"
#: Sampling as it was trained: the model's own distribution, without cut or guidance.
SAMPLING: dict[str, Any] = {"do_sample": True, "top_k": 0, "guidance_scale": 1.0}
#: Images at once.
BATCH = 100
#: The same with the adaptive window, where the rows of a batch start together.
ADAPTIVE_BATCH = 50


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How images are decoded.

    Args:
        name: As it is shown.
        family: What it is one of.
        window: Columns; None is the model's own raster decoding.
        adaptive: See `ZipARConfig`.
        row_start: See `ZipARConfig`.
        batch: Images at once when quality is measured.
    """

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


def decodings(
    columns: int,
    windows: Sequence[int],
    adaptive: Sequence[int],
    eager: Sequence[int],
    *,
    adaptive_batch: int = ADAPTIVE_BATCH,
) -> list[Decoding]:
    """Raster, then fixed windows from large to small, the adaptive ones, and those with eager row starts.

    Args:
        columns: Of the grid.
        windows: Fixed windows.
        adaptive: Least distances of adaptive windows.
        eager: Fixed windows with eager row starts.
        adaptive_batch: Images that an adaptive window decodes at once when quality is measured.

    Raises:
        ValueError: If a window is not from 1 to ``columns``.
    """
    if bad := [each for each in (*windows, *adaptive, *eager) if not 1 <= each <= columns]:
        raise TersorError(f"windows {bad} must be from 1 to the grid's {columns} columns")
    families: tuple[tuple[str, str, Sequence[int], dict[str, Any]], ...] = (
        ("fixed", "window", windows, {}),
        ("adaptive", "adaptive", adaptive, {"adaptive": True, "batch": adaptive_batch}),
        ("eager", "eager", eager, {"row_start": "eager"}),
    )
    return [
        Decoding(name=RASTER, family=RASTER),
        *(
            Decoding(name=f"{word} {window}", family=family, window=window, **settings)
            for family, word, sizes, settings in families
            for window in sorted(sizes, reverse=True)
        ),
    ]


@dataclass(frozen=True)
class Plan:
    """What a run of the benchmark does; part of its progress file.

    Args:
        model: Of the zoo.
        decodings: What is compared.
        samples: Images of each seed.
        seeds: Of the draws.
    """

    model: str
    decodings: tuple[Decoding, ...]
    samples: int
    seeds: tuple[int, ...]


def sample(
    model: LlamaGen, tokenizer: ImageTokenizer, judge: Judge, decoding: Decoding, *, samples: int, seed: int
) -> Samples:
    """Draw ``samples`` images, the classes in turns, and judge them; a pure function of its arguments."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % model.config.num_classes

    def batches() -> Iterator[tuple[Tensor, Tensor, int]]:
        for part in labels.split(decoding.batch):
            ids, starts = decoding.draw(model, part, generator)
            yield part, tokenizer.decode(ids), starts[-1] + model.config.grid_size[1] - 1

    return Samples.judged(batches(), judge)


def run_plan(
    plan: Plan, model: LlamaGen, tokenizer: ImageTokenizer, judge: Judge, finished: Finished[Samples]
) -> Iterator[tuple[str, Quality]]:
    """Yield each decoding's name and quality; what is finished is not drawn again."""
    for decoding in plan.decodings:
        seeds = []
        for seed in plan.seeds:
            draw = partial(sample, model, tokenizer, judge, decoding, samples=plan.samples, seed=seed)
            seeds.append(finished.once(f"{decoding.name}/{seed}", draw))
        yield decoding.name, Quality(seeds)


@dataclass(frozen=True)
class Speed:
    """All decodings in turns, one image at a time.

    Args:
        times: Seconds of an image.
        passes: Forward passes of each image, the warm-up's first.
    """

    times: PairedTimes
    passes: dict[str, list[int]]

    def ratio(self, name: str) -> Estimate:
        """How many times as fast as raster."""
        return self.times.ratio(RASTER, name, n_boot=2000)

    def images_per_second(self, name: str) -> Estimate:
        """Median with quartiles."""
        return rate(self.times, name)

    def mean_passes(self, name: str) -> float:
        """Forward passes of one image."""
        return float(np.mean(self.passes[name]))

    def realized(self, name: str) -> float:
        """Share of the ratio of passes that is there in time."""
        return self.ratio(name).value * self.mean_passes(name) / self.mean_passes(RASTER)


def time_decodings(model: LlamaGen, chosen: Sequence[Decoding], *, repeats: int, seed: int) -> Speed:
    """Time each decoding ``repeats`` times, in turns, at batch 1; the classes follow each other."""
    passes: dict[str, list[int]] = {each.name: [] for each in chosen}

    def one(decoding: Decoding) -> Callable[[], None]:
        def call() -> None:
            number = len(passes[decoding.name])
            generator = torch.Generator().manual_seed(seed + number)
            _, starts = decoding.draw(model, torch.tensor([number % model.config.num_classes]), generator)
            passes[decoding.name].append(starts[-1] + model.config.grid_size[1] - 1)

        return call

    times = time_paired({each.name: one(each) for each in chosen}, repeats=repeats, seed=seed)
    return Speed(times, passes)

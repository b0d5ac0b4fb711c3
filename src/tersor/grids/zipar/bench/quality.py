"""Images a second and the quality of samples, by how a raster model is decoded.

Quality: the share of samples that a classifier takes for the class that was asked for, the Fréchet distance of its
features to those of real images, and how probable the samples are to the model. Speed: all decodings in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tersor._errors import TersorError
from tersor.bench.measure import Estimate, PairedTimes, time_paired
from tersor.bench.runs import Finished
from tersor.grids.drawing import one_a_pass
from tersor.grids.llamagen import LlamaGen
from tersor.grids.pixels import ImageTokenizer
from tersor.grids.samples import Judge, Quality, Samples, rate
from tersor.grids.speculative.config import SpeculativeConfig
from tersor.grids.speculative.generation import speculative_generate
from tersor.grids.zipar.generation import zipar_generate

RASTER, SPECULATIVE = "raster", "speculative"
#: Sampling as it was trained: the model's own distribution, without cut or guidance.
SAMPLING: dict[str, Any] = {"do_sample": True, "top_k": 0, "guidance_scale": 1.0}
#: Images at once.
BATCH = 100
#: The same with the adaptive window, where the rows of a batch start together.
ADAPTIVE_BATCH = 50


class Drawn(NamedTuple):
    """Images of one batch.

    Args:
        ids: ``[batch, rows, columns]``.
        decided: The pass that decides each cell, by row.
        fed: Tokens of each image that went through the model.
    """

    ids: Tensor
    decided: list[list[int]]
    fed: int

    @property
    def passes(self) -> int:
        """Forward passes of the batch."""
        return self.decided[-1][-1]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How images are decoded.

    Args:
        name: As it is shown.
        family: What it is one of.
        window: Columns, or cells of a speculative window; None is the model's own raster decoding.
        adaptive: See `ZipARConfig`.
        row_start: See `ZipARConfig`.
        mode: Of speculative decoding, see `SpeculativeConfig`; None is ZipAR.
        batch: Images at once when quality is measured.
    """

    name: str
    family: str
    window: int | None = None
    adaptive: bool = False
    row_start: str = "auto"
    mode: str | None = None
    batch: int = BATCH

    def draw(self, model: LlamaGen, labels: Tensor, generator: torch.Generator, *, temperature: float = 1.0) -> Drawn:
        """Images of classes ``[batch]``."""
        rows, columns = model.config.grid_size
        sampling = {**SAMPLING, "temperature": temperature, "generator": generator}
        if self.window is None:
            ids = model.generate(labels, **sampling)
            starts = [1 + row * columns for row in range(rows)]
            return Drawn(ids.view(-1, rows, columns), one_a_pass(starts, columns), rows * columns - 1)
        sampling |= {"window_size": self.window, "return_dict_in_generate": True}
        if self.mode is None:
            out: Any = zipar_generate(model, labels, adaptive=self.adaptive, row_start=self.row_start, **sampling)
            decided = one_a_pass(out.row_start_pass, columns)
        else:
            out = speculative_generate(model, labels, mode=self.mode, **sampling)
            decided = np.repeat(np.arange(out.forward_passes) + 1, out.cells_per_pass).reshape(rows, columns).tolist()
        return Drawn(out.sequences.view(-1, rows, columns), decided, out.fed_tokens)


def decodings(
    columns: int,
    windows: Sequence[int],
    adaptive: Sequence[int],
    eager: Sequence[int],
    speculative: Sequence[int] = (),
    *,
    modes: Sequence[str] = ("seed",),
    adaptive_batch: int = ADAPTIVE_BATCH,
) -> list[Decoding]:
    """Raster, then fixed windows from large to small, the adaptive ones, those with eager row starts, the speculative.

    Args:
        columns: Of the grid.
        windows: Fixed windows.
        adaptive: Least distances of adaptive windows.
        eager: Fixed windows with eager row starts.
        speculative: Cells of speculative windows.
        modes: Of speculative decoding.
        adaptive_batch: Images that an adaptive window decodes at once when quality is measured.

    Raises:
        ValueError: If a window is not from 1 to ``columns``, or there is no such mode.
    """
    if bad := [each for each in (*windows, *adaptive, *eager) if not 1 <= each <= columns]:
        raise TersorError(f"windows {bad} must be from 1 to the grid's {columns} columns")
    for mode, cells in product(modes, speculative):
        SpeculativeConfig(mode=mode, window_size=cells)  # type: ignore[arg-type]
    families: tuple[tuple[str, str, Sequence[int], dict[str, Any]], ...] = (
        ("fixed", "window", windows, {}),
        ("adaptive", "adaptive", adaptive, {"adaptive": True, "batch": adaptive_batch}),
        ("eager", "eager", eager, {"row_start": "eager"}),
        *(
            (SPECULATIVE, SPECULATIVE if mode == "seed" else f"{mode} {SPECULATIVE}", speculative, {"mode": mode})
            for mode in modes
        ),
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
        temperature: Of the draws.
        dtype: Of the weights.
    """

    model: str
    decodings: tuple[Decoding, ...]
    samples: int
    seeds: tuple[int, ...]
    temperature: float = 1.0
    dtype: str = "float32"


def sample(
    model: LlamaGen,
    tokenizer: ImageTokenizer,
    judge: Judge,
    decoding: Decoding,
    *,
    samples: int,
    seed: int,
    temperature: float = 1.0,
) -> Samples:
    """Draw ``samples`` images, the classes in turns, and judge them; a pure function of its arguments."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % model.config.num_classes
    fed, nats = [], []

    def batches() -> Iterator[tuple[Tensor, Tensor, int]]:
        for part in torch.split(labels, decoding.batch):
            drawn = decoding.draw(model, part, generator, temperature=temperature)
            fed.append(drawn.fed)
            nats.extend(surprise(model, part, drawn.ids, temperature).tolist())
            yield part, tokenizer.decode(drawn.ids), drawn.passes

    judged = Samples.judged(batches(), judge)
    return replace(judged, fed=fed, nats=nats)


@torch.no_grad()
def surprise(model: LlamaGen, labels: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Minus the logarithm of the probability that raster decoding has for each image, ``[batch]``.

    Args:
        model: The model.
        labels: Classes ``[batch]``.
        ids: ``[batch, rows, columns]``.
        temperature: Of the draws.
    """
    cells = ids.flatten(1)
    logits: Tensor = model(input_ids=cells[:, :-1], class_labels=labels).logits
    return -(logits.float() / temperature).log_softmax(-1).gather(-1, cells[..., None]).sum((1, 2))


def run_plan(
    plan: Plan, model: LlamaGen, tokenizer: ImageTokenizer, judge: Judge, finished: Finished[Samples]
) -> Iterator[tuple[str, Quality]]:
    """Yield each decoding's name and quality; what is finished is not drawn again."""
    for decoding in plan.decodings:
        seeds = []
        for seed in plan.seeds:
            draw = partial(sample, model, tokenizer, judge, decoding, samples=plan.samples, seed=seed,
                           temperature=plan.temperature)  # fmt: skip
            seeds.append(finished.once(f"{decoding.name}/{seed}", draw))
        yield decoding.name, Quality(seeds)


@dataclass(frozen=True)
class Speed:
    """All decodings in turns.

    Args:
        times: Seconds of a batch.
        drawn: What each decoding drew in each round, the warm-up's first; from the same seeds.
        batch: Images at once.
    """

    times: PairedTimes
    drawn: dict[str, list[Drawn]]
    batch: int = 1

    @property
    def passes(self) -> dict[str, list[int]]:
        """Forward passes of each round, the warm-up's first."""
        return {name: [each.passes for each in rounds] for name, rounds in self.drawn.items()}

    def ratio(self, name: str) -> Estimate:
        """How many times as fast as raster."""
        return self.times.ratio(RASTER, name, n_boot=2000)

    def images_per_second(self, name: str) -> Estimate:
        """Median with quartiles."""
        return rate(self.times, name, self.batch)

    def mean_passes(self, name: str) -> float:
        """Forward passes of one batch."""
        return float(np.mean(self.passes[name]))

    def realized(self, name: str) -> float:
        """Share of the ratio of passes that is there in time."""
        return self.ratio(name).value * self.mean_passes(name) / self.mean_passes(RASTER)

    def fed(self, name: str) -> float:
        """Tokens that an image took through the model."""
        return float(np.mean([each.fed for each in self.drawn[name]]))

    def same(self, name: str) -> list[int]:
        """1 for each image that is raster's of the same seed, token by token."""
        pairs = zip(self.drawn[name], self.drawn[RASTER], strict=True)
        return [int(each) for own, raster in pairs for each in (own.ids == raster.ids).flatten(1).all(1)]


def time_decodings(
    model: LlamaGen,
    chosen: Sequence[Decoding],
    *,
    repeats: int,
    seed: int,
    batch: int = 1,
    temperature: float = 1.0,
) -> Speed:
    """Time each decoding ``repeats`` times, in turns; the classes follow each other."""
    drawn: dict[str, list[Drawn]] = {each.name: [] for each in chosen}

    def one(decoding: Decoding) -> Callable[[], None]:
        def call() -> None:
            number = len(drawn[decoding.name])
            generator = torch.Generator().manual_seed(seed + number)
            labels = (number + torch.arange(batch)) % model.config.num_classes
            drawn[decoding.name].append(decoding.draw(model, labels, generator, temperature=temperature))

        return call

    times = time_paired({each.name: one(each) for each in chosen}, repeats=repeats, seed=seed)
    return Speed(times, drawn, batch)

"""NAR against raster and PAR of the same backbone: quality of samples, and images a second by batch size.

Quality: the share of samples that a classifier takes for the class that was asked for, and the Fréchet distance of its
features to those of real images; the loss on held-out images stands in the checkpoints' locks. Every model has its
temperature and guidance chosen on samples of a seed that is not evaluated, by that distance, as the field does;
one-sided mixing takes NAR's.
Speed: all decodings in turns, for each batch size.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tersor.bench.measure import Estimate, PairedTimes, bootstrap_interval, over_seeds, time_paired
from tersor.bench.runs import Finished
from tersor.grids.geometry import front_count
from tersor.grids.judge import DigitClassifier
from tersor.grids.llamagen import LlamaGen
from tersor.grids.nar.baselines import PARForImageGeneration
from tersor.grids.nar.captions import Captions, caption
from tersor.grids.nar.heads import NARForImageGeneration
from tersor.grids.nar.pipeline import NARPipeline
from tersor.grids.samples import Judge, Quality, Samples, rate

NAR, RASTER = "NAR", "raster"
#: Names of what a checkpoint is compared with, as they are shown; of images PAR-14X takes as many passes as NAR.
SHOWN = {"raster": RASTER, "par4x": "PAR-4X", "par14x": "PAR-14X", "single-head": "single head"}
MIXINGS = {"right": "right head alone", "below": "head below alone", "later": "later head alone"}
#: Samples at once; a GPU takes more in the same time.
BATCH = {"cpu": 100, "cuda": 1000}
#: Seed of the samples that settings are chosen on; evaluation counts from 1.
VALIDATION_SEED = 0


class PixelDecoder(Protocol):
    """What turns ids into pixels."""

    def decode(self, ids: Tensor, /) -> Tensor:
        """Images or clips of ids ``[batch, *grid]``."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How samples are drawn; the same choices for every decoding."""

    temperature: float = 1.0
    guidance: float = 1.0

    def __str__(self) -> str:
        return f"temperature {self.temperature:g}, guidance {self.guidance:g}"


#: From the model's own distribution to sharper ones.
CHOICES = tuple(Settings(temperature=t, guidance=g) for g in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5) for t in (1.0, 0.95, 0.9))

#: Of captions, which are heeded more with more guidance.
CAPTION_CHOICES = tuple(Settings(temperature=t, guidance=g) for g in (1.0, 1.5, 2.0, 3.0) for t in (1.0, 0.95, 0.9))


@dataclass(frozen=True)
class Decoding:
    """A model, decoded in its own order.

    Args:
        name: As it is shown.
        model: What is decoded.
        grid: Axes of a sample, in tokens.
        passes: Forward passes of a batch.
    """

    name: str
    model: Any
    grid: tuple[int, ...]
    passes: int

    def draw(self, labels: Tensor, generator: torch.Generator, settings: Settings) -> Tensor:
        """Ids ``[batch, *grid]``, on the model's device, for classes ``[batch]``."""
        labels = labels.to(self.model.device)
        options: dict[str, Any] = {
            "temperature": settings.temperature,
            "guidance_scale": settings.guidance,
            "generator": generator,
        }
        if isinstance(self.model, NARForImageGeneration):
            ids = self.model.generate(labels, **options)
            assert isinstance(ids, Tensor)
            return ids
        if isinstance(self.model, PARForImageGeneration):
            return self.model.generate(labels, **options).sequences
        ids = self.model.generate(labels, do_sample=True, top_k=0, **options)
        return torch.as_tensor(ids).view(-1, *self.grid)


def decodings(model: NARForImageGeneration, compared: dict[str, LlamaGen | NARForImageGeneration]) -> list[Decoding]:
    """NAR, what it is compared with (see `SHOWN`), and NAR's weights with one head wherever that sees the cell.

    Args:
        model: NAR's.
        compared: Models of the same grid and classes, by kind.
    """
    grid = tuple(model.config.grid_size)
    found = [Decoding(NAR, model, grid, front_count(grid))]
    for kind, name in SHOWN.items():
        if kind in compared:
            other: Any = compared[kind]
            passes = front_count(grid) if isinstance(other, NARForImageGeneration) else torch.Size(grid).numel()
            passes = len(other.groups) if isinstance(other, PARForImageGeneration) else passes
            found.append(Decoding(name, other, grid, passes))
    for mixing, name in MIXINGS.items():
        if mixing != "later" or len(grid) == 3:
            found.append(Decoding(name, one_sided(model, mixing), grid, front_count(grid)))
    return found


def one_sided(model: NARForImageGeneration, mixing: str) -> NARForImageGeneration:
    """The same weights, not copied, with another ``mixing``."""
    other = copy.copy(model)
    other.config = copy.deepcopy(model.config)
    other.config.mixing = mixing
    return other


@dataclass(frozen=True)
class Plan:
    """What a run measures of quality; part of its progress file.

    Args:
        model: Of the zoo.
        decodings: Names of what is compared.
        samples: Samples of each seed.
        seeds: Of the draws.
        validation: Samples to choose settings by.
    """

    model: str
    decodings: tuple[str, ...]
    samples: int
    seeds: tuple[int, ...]
    validation: int


def sample(
    decoding: Decoding, tokenizer: PixelDecoder, judge: Judge, settings: Settings, *, samples: int, seed: int
) -> Samples:
    """Draw ``samples``, the classes in turns, and judge them; a pure function of its arguments."""
    device = decoding.model.device
    generator = torch.Generator(device).manual_seed(seed)
    labels = torch.arange(samples) % decoding.model.config.num_classes
    parts = labels.split(BATCH.get(device.type, BATCH["cpu"]))
    drawn = ((part, decoding.draw(part, generator, settings).cpu()) for part in parts)
    return Samples.judged(((part, tokenizer.decode(ids), decoding.passes) for part, ids in drawn), judge)


def choose(found: dict[str, Samples], name: str) -> Settings:
    """The settings whose validation samples are nearest to real ones."""
    return min(CHOICES, key=lambda each: found[f"{name}/{each}"].distance)


def run_plan(
    plan: Plan, chosen: Sequence[Decoding], tokenizer: PixelDecoder, judge: Judge, finished: Finished[Samples]
) -> Iterator[tuple[str, Settings, Quality]]:
    """Yield each decoding's name, settings and quality; what is finished is not drawn again."""

    def measure(key: object, decoding: Decoding, settings: Settings, samples: int, seed: int) -> Samples:
        draw = partial(sample, decoding, tokenizer, judge, settings, samples=samples, seed=seed)
        return finished.once(f"{decoding.name}/{key}", draw)

    for decoding in chosen:
        decides = NAR if decoding.name in MIXINGS.values() else decoding.name
        if decides == decoding.name:
            for each in CHOICES:
                measure(each, decoding, each, plan.validation, VALIDATION_SEED)
        settings = choose(finished.results, decides)
        seeds = [measure(seed, decoding, settings, plan.samples, seed) for seed in plan.seeds]
        yield decoding.name, settings, Quality(seeds)


@dataclass(frozen=True)
class CaptionScores:
    """Which samples show what their caption says: 1 or 0 for each, by what is looked at.

    Args:
        right: By the classifier for "digit", by measuring for "stroke" and "slant", and for "all" three.
    """

    right: dict[str, list[int]]

    def share(self, what: str) -> Estimate:
        """With its 95 % bootstrap interval."""
        return bootstrap_interval(self.right[what], n_boot=2000)


def score_captions(
    pipeline: NARPipeline,
    classifier: DigitClassifier,
    captions: Captions,
    settings: Settings,
    *,
    samples: int,
    seed: int,
    captioned: bool = True,
) -> CaptionScores:
    """Draw ``samples`` of captions that name digit, stroke and slant, all combinations in turns, and look at them.

    Args:
        pipeline: Draws.
        classifier: Judges digits.
        captions: Judges strokes and slants.
        settings: Of the draws.
        samples: How many.
        seed: Of the draws.
        captioned: Whether the model reads them; without, it draws from the null condition, for the level of chance.
    """
    generator, number = torch.Generator().manual_seed(seed), torch.arange(samples)
    digits, strokes, sides = number % 10, 2 * (number // 10 % 2), number // 20 % 3
    right: dict[str, list[int]] = {"digit": [], "stroke": [], "slant": [], "all": []}
    for part in torch.split(number, BATCH["cpu"]):
        asked = [caption(int(digits[i]), int(strokes[i]), int(sides[i])) for i in part]
        images = pipeline(
            prompt=asked if captioned else [""] * len(asked),
            generator=generator,
            output_type="pt",
            temperature=settings.temperature,
            guidance_scale=settings.guidance if captioned else 1.0,
        ).images
        _, seen = classifier.judge(images)
        thick, leaning = captions.classes(images)
        found = {"digit": seen == digits[part], "stroke": thick == strokes[part], "slant": leaning == sides[part]}
        found["all"] = found["digit"] & found["stroke"] & found["slant"]
        for what, each in found.items():
            right[what] += each.int().tolist()
    return CaptionScores(right)


def excess(ours: Quality, theirs: Quality, floor: float) -> Estimate:
    """Ratio of the mean Fréchet distances above the tokenizer's ``floor``; the seeds are paired.

    The interval is that of the ratio's linear part. A mean of the seeds' own ratios would be ruled by the seed in which
    ``theirs`` comes nearest to the floor.
    """
    above, below = (np.array([each.distance for each in quality.seeds]) - floor for quality in (ours, theirs))
    ratio = float(above.mean() / below.mean())
    return over_seeds((ratio + (above - ratio * below) / below.mean()).tolist())


@dataclass(frozen=True)
class Speed:
    """All decodings in turns at one batch size.

    Args:
        batch: Samples at once.
        passes: Forward passes by name.
        times: Seconds of a batch.
    """

    batch: int
    passes: dict[str, int]
    times: PairedTimes

    def rate(self, name: str) -> Estimate:
        """Samples a second, median with quartiles."""
        return rate(self.times, name, self.batch)

    def over(self, other: str) -> Estimate:
        """How many times as fast as ``other`` NAR is."""
        return self.times.ratio(other, NAR, n_boot=2000)

    def realized(self, other: str) -> float:
        """Share of the ratio of passes that is there in time."""
        # Equal passes give exactly 1 here, which a product followed by a division may miss by rounding.
        return self.over(other).value / (self.passes[other] / self.passes[NAR])


#: What is timed: the ablations take NAR's passes.
TIMED = (NAR, RASTER, SHOWN["par4x"])
#: Samples that a turn draws at least, batch after batch: the first one finds the caches full of another model.
TURN = 4


def time_decodings(chosen: Sequence[Decoding], *, batch: int, repeats: int, seed: int) -> Speed:
    """Time NAR and what takes other passes at one batch size, without guidance; seconds are of a batch."""
    timed = [each for each in chosen if each.name in TIMED]
    labels = torch.arange(batch) % timed[0].model.config.num_classes
    draws = max(1, TURN // batch)

    def turn(decoding: Decoding) -> Callable[[], None]:
        def run() -> None:
            for _ in range(draws):
                decoding.draw(labels, torch.Generator(decoding.model.device).manual_seed(seed), Settings())

        return run

    times = time_paired({each.name: turn(each) for each in timed}, repeats=repeats, seed=seed)
    seconds = {name: tuple(each / draws for each in found) for name, found in times.samples.items()}
    return Speed(batch, {each.name: each.passes for each in timed}, PairedTimes(seconds))


@dataclass(frozen=True)
class Locked:
    """What a checkpoint's recipe has measured on real samples.

    Args:
        floors: Fréchet distances of ``"real"`` and of ``"reconstructed"`` samples, ``"images"`` at a time.
        losses: Nats a token, by the name of a decoding, of ``held_out`` samples.
    """

    floors: dict[str, Any]
    losses: dict[str, float]
    held_out: int


def locked(folder: Path) -> Locked:
    """From the locks of the checkpoint in ``folder`` and of what is compared with it."""

    def lock(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / "recipe.lock.json").read_text(encoding="utf-8"))
        return found

    own, others = lock(folder), folder / "compared"
    scores, key = own["scores"], "held_out_nats_per_token"
    losses = {NAR: scores[key]}
    losses |= {name: lock(others / kind)["scores"][key] for kind, name in SHOWN.items() if (others / kind).is_dir()}
    losses |= {MIXINGS[head]: loss for head, loss in scores[f"{key}_of_heads_alone"].items()}
    return Locked(scores["frechet_floors"], losses, own["plan"]["looked_at"])

"""The one decoder: orders of one's own, and the ids of the embedded models, which no change of code may change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import pytest
import torch

import tersor
from tersor import zoo
from tersor.grids.cache import FrontCache
from tersor.grids.decoding import AppendingReader, Ready, decode, ready_steps
from tersor.grids.geometry import raster_place
from tersor.grids.nar.bench.quality import one_sided
from tersor.grids.sampling import Sampler
from tersor.grids.schedule import NARSchedule, RasterSchedule, Schedule, Step, group_steps


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Shuffled:
    """A new order: cells at random places, ``width`` of them a pass."""

    sizes: tuple[int, int]
    width: int

    def steps(self) -> Iterator[Step]:
        cells = [*product(*map(range, self.sizes))]
        order = [cells[each] for each in torch.randperm(len(cells), generator=generator(3)).tolist()]
        return group_steps(
            (order[first : first + self.width] for first in range(0, len(order), self.width)), self.sizes
        )


class Counting(AppendingReader):
    """A model without weights: a cell's id is how many tokens are in the cache when it is decided."""

    def __init__(self, samples: int, cells: int) -> None:
        self.places: list[list[int]] = []
        cache = FrontCache(2 + cells, layers=1)
        valid = torch.ones(samples, 2, dtype=torch.bool)
        super().__init__(
            torch.zeros(samples, 2, 1), valid, lambda ids: ids[..., None].float(), cache, Sampler([], False)
        )

    def forward(self, ready: Ready, embeddings, places, seen):
        self.places.append(places.tolist())
        self.cache.update(embeddings[:, None], embeddings[:, None], 0)
        logits = torch.zeros(len(embeddings), len(ready.step.cells), 100)
        logits[..., self.cache.used] = 1
        return logits


@pytest.mark.parametrize("schedule", [RasterSchedule((3, 4)), NARSchedule((3, 4)), Shuffled((3, 4), 5)])
def test_an_order_is_a_schedule_and_nothing_else(schedule: Schedule) -> None:
    reader, ids = Counting(2, 12), torch.full((2, 12), -1)
    steps = list(schedule.steps())
    assert decode(reader, ready_steps(schedule, ids.device), ids) == len(steps)
    assert reader.places == [[0, 1], *([2 + place for place in step.fed] for step in steps[1:])]
    # The prefix's two tokens, and all cells of the passes before.
    decided = 2
    for step in steps:
        assert ids[:, list(step.targets)].eq(decided).all()
        assert [raster_place(cell, (3, 4)) for cell in step.cells] == list(step.targets)
        decided += len(step.cells)
    assert decided == 14


def test_a_decoder_may_be_stopped_before_any_pass() -> None:
    seen = []

    def stop(ids: torch.Tensor) -> None:
        seen.append(int((ids >= 0).sum()))
        if len(seen) == 3:
            raise TimeoutError

    ids = torch.full((1, 12), -1)
    with pytest.raises(TimeoutError):
        decode(Counting(1, 12), ready_steps(RasterSchedule((3, 4)), ids.device), ids, stop)
    assert seen == [0, 1, 2]


def digest(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.to(torch.int16).contiguous().numpy().tobytes()).hexdigest()[:12]


LABELS = torch.arange(3)
PROMPTS = ("a thick seven slanted left", "a thin three", "")


def decoded(name: str, options: dict) -> torch.Tensor:
    """Three samples of a model of the zoo, of one that it is compared with, or of its ablation."""
    name, _, kind = name.partition("/")
    model = zoo.load_model(name) if kind in ("", "right") else zoo.load_compared(name)[kind]
    if kind == "right":
        model = one_sided(model, "right")
    options = {**options, "generator": generator(1)}
    if "window_size" in options:
        return tersor.zipar_generate(model, LABELS, **options)
    if name == "tiny-nar-text":
        features, mask = zoo.load_text_encoder(name)(PROMPTS)
        return model.generate(text_features=features, text_mask=mask, **options)
    found = model.generate(LABELS, **options)
    return found if isinstance(found, torch.Tensor) else found.sequences


GREEDY = {"do_sample": False, "guidance_scale": 4.0}
DRAWN = {"do_sample": True, "top_k": 12, "temperature": 1.3, "top_p": 0.9, "guidance_scale": 1.0}
GUIDED = {**DRAWN, "guidance_scale": 2.0}
NAR_GREEDY = {"temperature": 0, "guidance_scale": 4.0}
NAR_DRAWN = {"temperature": 0.9, "top_k": 12, "top_p": 0.9, "guidance_scale": 1.0}
NAR_GUIDED = {**NAR_DRAWN, "guidance_scale": 2.0}
DIGESTS = [
    ("tiny-raster", GREEDY, "90b1f9c70b66"),
    ("tiny-raster", GUIDED, "aa5ee8e7845d"),
    ("tiny-nar/raster", GREEDY, "b59727517e9a"),
    ("tiny-nar/raster", GUIDED, "f84b3753442b"),
    ("tiny-nar-video/raster", GREEDY, "a0e780088636"),
    ("tiny-nar-video/raster", GUIDED, "4e7334376859"),
    ("tiny-raster", {"window_size": 7, **GREEDY}, "9e3d68426824"),
    ("tiny-raster", {"window_size": 7, **GUIDED}, "9bd88451cabd"),
    ("tiny-raster", {"window_size": 1, **DRAWN}, "1bbeebdf3988"),
    ("tiny-raster", {"window_size": 4, "row_start": "eager", **DRAWN}, "ab75c29a02a7"),
    ("tiny-raster", {"window_size": 2, "adaptive": True, **GUIDED}, "b62c1a117608"),
    ("tiny-raster", {"window_size": 4, "adaptive": True, **GREEDY}, "d0ddfbbd9a1b"),
    ("tiny-nar", NAR_GREEDY, "520cb8b5ce86"),
    ("tiny-nar", NAR_GUIDED, "826fafd9dcc8"),
    ("tiny-nar-video", NAR_GREEDY, "48509169165f"),
    ("tiny-nar-video", NAR_GUIDED, "93fda358fc92"),
    ("tiny-nar/single-head", NAR_GREEDY, "c53fcf673b7e"),
    ("tiny-nar/single-head", NAR_GUIDED, "ec56ec8f6f9c"),
    ("tiny-nar", {"cfg_interval": 9, "guidance_scale": 2.0}, "1fe3665c27a9"),
    ("tiny-nar/right", NAR_DRAWN, "cd2f43b4c0ef"),
    ("tiny-nar/par4x", NAR_GREEDY, "95e0ae0bd9d7"),
    ("tiny-nar/par4x", {"temperature": 0.9, "top_k": 12, "guidance_scale": 2.0}, "37ee285230b8"),
    ("tiny-nar/par14x", NAR_GREEDY, "3b8648e4a786"),
    ("tiny-nar/par14x", {"temperature": 0.9, "top_k": 12, "guidance_scale": 2.0}, "026aad0fab12"),
    ("tiny-nar-text", NAR_GREEDY, "02fad7a95550"),
    ("tiny-nar-text", NAR_GUIDED, "a6d25b587228"),
]


@pytest.mark.parametrize(("name", "options", "expected"), DIGESTS)
def test_embedded_models_decode_the_same_ids_as_ever(name: str, options: dict, expected: str) -> None:
    assert digest(decoded(name, options)) == expected

"""What NAR is compared with, of the same backbone: PAR's parallel order (arXiv 2412.15119), and raster for videos."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor._errors import TersorError
from tersor.grids.cache import FrontCache
from tersor.grids.decoding import AppendingReader, Ready, decode, ready_steps
from tersor.grids.geometry import Cell, raster_place
from tersor.grids.llamagen import LlamaGen, LlamaGenConfig, RasterReader
from tersor.grids.nar.decoding import NAROutput, Sampling
from tersor.grids.nar.heads import NARImageOutput
from tersor.grids.sampling import additive
from tersor.grids.schedule import Step, group_steps


@dataclass(frozen=True)
class PARSchedule:
    """PAR's order: the first cells of all regions one by one, then the next cell of every region in one pass.

    Args:
        rows: Rows of the grid.
        columns: Columns of the grid.
        regions: How many parts the image is cut into from top to bottom and from left to right.

    Raises:
        ValueError: If the regions do not divide the sides.
    """

    rows: int
    columns: int
    regions: tuple[int, int] = (2, 2)

    def __post_init__(self) -> None:
        down, across = self.regions
        if min(self.regions) < 1 or self.rows % down or self.columns % across:
            raise TersorError(f"grid {(self.rows, self.columns)} must be a multiple of regions={self.regions}")

    @property
    def transition(self) -> int:
        """The first pass that decides a cell of every region."""
        return math.prod(self.regions)

    def groups(self) -> list[tuple[Cell, ...]]:
        """The cells that each pass decides; regions, and the cells of each, are in raster order."""
        down, across = self.regions
        height, width = self.rows // down, self.columns // across
        corners = [(row * height, column * width) for row in range(down) for column in range(across)]
        first, *later = (
            tuple((top + row, left + column) for top, left in corners)
            for row in range(height)
            for column in range(width)
        )
        return [*((cell,) for cell in first), *later]

    def steps(self) -> Iterator[Step]:
        """See `Schedule`; the first parallel pass feeds a token for each region, all but the last of them again."""
        groups, sizes = self.groups(), (self.rows, self.columns)
        fed = tuple(raster_place(cell, sizes) for group in groups[: self.transition] for cell in group)
        for number, step in enumerate(group_steps(groups, sizes)):
            if number == self.transition:
                step = replace(step, fed=fed, sources=fed, keep=tuple(range(len(fed))))
            yield step


def par_groups(rows: int, columns: int, regions: tuple[int, int] = (2, 2)) -> tuple[tuple[int, ...], ...]:
    """Raster indices of the cells that each pass of PAR decides; see `PARSchedule`."""
    return tuple(step.targets for step in PARSchedule(rows, columns, regions).steps())


class PARConfig(LlamaGenConfig):
    """A `LlamaGenConfig` with the number of ``regions`` from top to bottom and from left to right; 2 by 2 is PAR-4X."""

    model_type = "tersor_par"

    regions: tuple[int, int] | list[int] = (2, 2)

    def __post_init__(self, **kwargs: Any) -> None:
        self.regions = (self.regions[0], self.regions[1])
        super().__post_init__(**kwargs)


class PARForImageGeneration(LlamaGen):
    """LlamaGen in PAR's order, by class.

    Each token of a part yields the next one of its part; the tokens of a pass see each other and all earlier ones.
    Where the passes become parallel, the last single token is fed with one learned token for each other part.
    """

    config_class = PARConfig

    def __init__(self, config: PARConfig) -> None:
        super().__init__(config)
        rows, columns = config.grid_size
        self.schedule = PARSchedule(rows, columns, (config.regions[0], config.regions[1]))
        #: Raster indices of the cells that each pass decides.
        self.groups = tuple(step.targets for step in self.schedule.steps())
        self.transition = nn.Parameter(torch.empty(math.prod(config.regions) - 1, config.hidden_size))
        nn.init.normal_(self.transition, std=config.initializer_range)

    def forward(  # type: ignore[override]  # the whole image at once; its passes use the parent's
        self, input_ids: Tensor, class_labels: Tensor | None = None, labels: Tensor | None = None
    ) -> NARImageOutput:
        """Logits ``[batch, cells, vocabulary]`` in raster order, and a loss with ``labels``.

        Args:
            input_ids: All cells' ids in raster order, ``[batch, cells]`` or ``[batch, rows, columns]``.
            class_labels: ``[batch]``.
            labels: Ids to predict, shaped like ``input_ids``; -100 is left out.
        """
        ids = input_ids.flatten(1)
        dropped = None
        if self.training and self.config.condition_dropout > 0:
            dropped = torch.rand(len(ids), device=ids.device) < self.config.condition_dropout
        prefix, _ = self.condition(class_labels, dropped=dropped)
        steps = ready_steps(self.schedule, ids.device)
        fed = [self.embed(ready.number, ids.index_select(1, ready.sources)) for ready in steps[1:]]
        embeddings = torch.cat([prefix, *fed], dim=1)
        places = torch.cat([torch.zeros(1, dtype=torch.long, device=ids.device), *(1 + each.fed for each in steps[1:])])
        # A pass sees itself and what comes before it.
        passes = torch.cat([torch.full_like(each.targets, each.number) for each in steps])
        mask = additive(passes > passes[:, None], embeddings.dtype)
        decided = torch.cat([each.targets for each in steps])
        found = super().forward(inputs_embeds=embeddings, position_ids=places[None], attention_mask=mask[None, None])
        logits = torch.empty_like(found.logits)
        logits[:, decided] = found.logits
        if labels is None:
            return NARImageOutput(logits=logits.float())
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        return NARImageOutput(loss=loss, logits=logits.float())

    def embed(self, number: int, tokens: Tensor) -> Tensor:
        """Embeddings of what pass ``number`` feeds; at the transition all regions but the last have a learned one."""
        if number != self.schedule.transition:
            return self.tok_embeddings(tokens)
        learned = self.transition.to(self.dtype).expand(len(tokens), -1, -1)
        return torch.cat([learned, self.tok_embeddings(tokens[:, -1:])], dim=1)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        class_labels: Tensor,
        *,
        guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        generator: torch.Generator | None = None,
    ) -> NAROutput:
        """Images ``[batch, rows, columns]``; arguments as of `NARForImageGeneration.generate`."""
        scale = self.config.default_guidance if guidance_scale is None else guidance_scale
        sampling = Sampling(guidance_scale=scale, temperature=temperature, top_k=top_k)
        prefix, valid = self.condition(class_labels, guided=sampling.guided)
        rows, columns = self.config.grid_size
        cache = FrontCache(prefix.shape[1] + rows * columns, len(self.layers))
        reader = PARReader(self, prefix, valid, cache, sampling.sampler(generator), guidance=scale)
        ids = torch.zeros(len(class_labels), rows * columns, dtype=torch.long, device=prefix.device)
        passes = decode(reader, ready_steps(self.schedule, prefix.device), ids)
        return NAROutput(sequences=ids.view(-1, rows, columns), forward_passes=passes)


class PARReader(RasterReader):
    """A PAR model: each token of a region gives the next one of its region; guided on logits, as NAR is."""

    def fed(self, ready: Ready, ids: Tensor) -> Tensor:
        """See `AppendingReader`."""
        embeddings = self.model.embed(ready.number, ids.index_select(1, ready.sources))
        return embeddings.repeat(self.branches, 1, 1)

    def choose(self, ready: Ready, logits: Tensor, ids: Tensor) -> Tensor:
        """See `AppendingReader`."""
        return AppendingReader.choose(self, ready, logits, ids)


class RasterVideoConfig(LlamaGenConfig):
    """A `LlamaGenConfig` for videos: ``grid_size`` is (frames times rows, columns)."""

    model_type = "tersor_raster_video"

    frames: int = 4


class RasterVideo(LlamaGen):
    """LlamaGen token by token through the frames of a video, with rotary positions by its three axes, as NAR's."""

    config_class = RasterVideoConfig

    @property
    def axes(self) -> tuple[int, ...]:
        rows, columns = self.config.grid_size
        return (self.config.frames, rows // self.config.frames, columns)

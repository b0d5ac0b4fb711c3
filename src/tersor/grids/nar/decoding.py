"""NAR's decoding: one forward for each front of the grid, and one cache that is only appended to."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import ModelOutput

from tersor._errors import TersorError
from tersor.grids.cache import FrontCache
from tersor.grids.decoding import AppendingReader, Ready, decode, ready_steps
from tersor.grids.geometry import check_sizes
from tersor.grids.sampling import Generators, Sampler, check_cfg_interval
from tersor.grids.schedule import NARSchedule


@dataclass
class NAROutput(ModelOutput):
    """What is returned with ``return_dict_in_generate=True``.

    Args:
        sequences: Ids ``[samples, *grid]``.
        logits: Mixed and before guidance, float32 ``[samples, *grid, vocabulary]``, with ``output_logits=True``.
        forward_passes: The prefix's pass counts.
        tokens_per_pass: Cells over passes.
    """

    sequences: Tensor
    logits: Tensor | None = None
    forward_passes: int | None = None
    tokens_per_pass: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; see `NARForImageGeneration.generate`.

    Raises:
        ValueError: If a setting is outside its range.
    """

    guidance_scale: float
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.guidance_scale < math.inf:
            raise TersorError(f"guidance_scale={self.guidance_scale} must be a number from 1, which is no guidance")
        if not 0 <= self.temperature < math.inf:
            raise TersorError(f"temperature={self.temperature} must not be negative; 0 takes the most likely token")
        if not isinstance(self.top_k, int) or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise TersorError(
                f"top_k={self.top_k!r} must be a whole number from 0, top_p={self.top_p} above 0 and up to 1"
            )
        check_cfg_interval(self.cfg_interval, self.guidance_scale if self.guided else None)

    @property
    def guided(self) -> bool:
        """Whether there is a null condition beside each sample."""
        return self.guidance_scale != 1

    def check(self, model: Any) -> None:
        """Raise `ValueError` if the model has no null condition to guide by."""
        if self.guided and not model.config.has_null:
            raise TersorError(
                f"guidance_scale={self.guidance_scale}: this model was trained without a null condition "
                "(condition_dropout=0 or condition='none'); use guidance_scale=1"
            )

    def sampler(self, generator: Generators) -> Sampler:
        """Temperature first, as in the authors' code."""
        processors: list[Any] = []
        if self.temperature not in (0, 1):
            processors.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        return Sampler(processors, self.temperature > 0, generator)


def resolve_grid(config: Any, grid_size: tuple[int, ...] | None, *, warn: bool = False) -> tuple[int, ...]:
    """The grid of a call: the model's own, or with rotary positions another one with as many axes.

    Raises:
        ValueError: If there is another number of axes, an axis below 1, or another grid where positions are by place.
    """
    own = tuple(config.grid_size)
    if not isinstance(grid_size, (tuple, list, type(None))):
        raise TersorError(f"grid_size={grid_size!r} must have {len(own)} axes, like the model's {own}")
    sizes = own if grid_size is None else tuple(grid_size)
    check_sizes(sizes)
    if len(sizes) != len(own):
        raise TersorError(f"grid_size={sizes} must have {len(own)} axes, like the model's {own}")
    if sizes != own and config.position_type != "rope":
        raise TersorError(
            f"grid_size={sizes}: this model has {config.position_type} positions for {own} only; "
            "another grid takes rotary ones"
        )
    if sizes != own and warn:
        warnings.warn(f"grid_size={sizes}: the model was trained for {own}", stacklevel=4)
    return sizes


class MixedModel(Protocol):
    """What `decode_fronts` calls of a `NARForImageGeneration`."""

    config: Any
    #: The backbone: embeddings and blocks.
    model: Any

    def mixed_logits(self, states: tuple[Tensor, ...], plan: Any) -> Tensor:
        """Logits of cells by the states of each head."""


class NARReader(AppendingReader):
    """A NAR model, whose heads at a cell's neighbours together give the cell's logits.

    Args:
        model: The model.
        prefix: See `AppendingReader`.
        valid: See `AppendingReader`.
        sizes: Axes of the grid.
        plans: For each pass, how its logits are mixed from the states of the front before.
        sampling: Guidance and draws.
        generator: Where draws come from.
        output_logits: Keep the mixed logits, before guidance.
    """

    def __init__(
        self,
        model: MixedModel,
        prefix: Tensor,
        valid: Tensor,
        sizes: tuple[int, ...],
        plans: Sequence[Any],
        sampling: Sampling,
        generator: Generators = None,
        *,
        output_logits: bool = False,
    ) -> None:
        backbone, cells = model.model, math.prod(sizes)
        super().__init__(
            prefix,
            valid,
            backbone.tok_embeddings,
            FrontCache(prefix.shape[1] + cells, len(backbone.layers)),
            sampling.sampler(generator),
            guidance=sampling.guidance_scale,
            guided_cells=sampling.cfg_interval,
        )
        self.model, self.sizes, self.plans = model, sizes, plans
        shape = self.samples, cells, model.config.vocab_size
        self.kept = torch.zeros(shape, device=prefix.device) if output_logits else None

    def forward(self, ready: Ready, embeddings: Tensor, places: Tensor, seen: Tensor | None) -> Tensor:
        """See `AppendingReader`."""
        # What is in the cache is no farther from the first cell, so that only padding is to be hidden.
        states = self.model.model(embeddings, places, self.sizes, seen, self.cache)
        if ready.number == 0:
            states = tuple(state[:, -1:] for state in states)
        logits = self.model.mixed_logits(states, self.plans[ready.number])
        if self.kept is not None:
            self.kept.index_copy_(1, ready.targets, logits[: self.samples])
        return logits


def decode_fronts(reader: NARReader) -> NAROutput:
    """Decode one batch, one front of the grid a pass."""
    samples, sizes, device = reader.samples, reader.sizes, reader.prefix.device
    ids = torch.zeros(samples, math.prod(sizes), dtype=torch.long, device=device)
    passes = decode(reader, ready_steps(NARSchedule(sizes), device), ids)
    return NAROutput(
        sequences=ids.view(samples, *sizes),
        logits=None if reader.kept is None else reader.kept.view(samples, *sizes, -1),
        forward_passes=passes,
        tokens_per_pass=ids.shape[1] / passes,
    )

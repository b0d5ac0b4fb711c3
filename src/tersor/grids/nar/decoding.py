"""NAR's decoding: one forward for each front of the grid, and one cache that is only appended to."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import ModelOutput

from tersor.grids.geometry import check_sizes, fronts
from tersor.grids.zipar.decoding import Sampler

if TYPE_CHECKING:
    from tersor.grids.nar.heads import MixingPlan, NARForImageGeneration
    from tersor.grids.nar.model import NARConfig


@dataclass
class NAROutput(ModelOutput):
    """What is returned with ``return_dict_in_generate=True``.

    Args:
        sequences: ids ``[samples, *grid]``.
        logits: mixed and before guidance, float32 ``[samples, *grid, vocabulary]``, with ``output_logits=True``.
        forward_passes: the prefix's pass counts.
        tokens_per_pass: cells over passes.
    """

    sequences: Tensor
    logits: Tensor | None = None
    forward_passes: int | None = None
    tokens_per_pass: float | None = None


class FrontCache:
    """Keys and values of one decoding in the order in which they are fed, in memory that is taken once.

    A cache that grows would be copied in every pass, which in large batches takes as long as the products. In small
    ones each operation takes as long as another, so a pass's views are made for all layers at once.

    Args:
        slots: tokens that there will be, prefix and cells.
        layers: of the model.
    """

    def __init__(self, slots: int, layers: int) -> None:
        self.slots, self.layers, self.used = slots, layers, 0
        self.memory: Tensor | None = None
        # Keys and values of each layer in turns: where this pass's go, and all that there is.
        self.written: tuple[Tensor, ...] = ()
        self.kept: tuple[Tensor, ...] = ()

    def get_seq_length(self) -> int:
        """Tokens that are there."""
        return self.used

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append ``[rows, heads, tokens, head_dim]`` and return all that there is, as the library's caches do.

        A pass goes through the layers from 0 on.
        """
        if layer == 0:
            self._begin(keys)
        self.written[2 * layer].copy_(keys)
        self.written[2 * layer + 1].copy_(values)
        return self.kept[2 * layer], self.kept[2 * layer + 1]

    def _begin(self, keys: Tensor) -> None:
        """Make the views of a pass that feeds as many tokens as ``keys`` has."""
        rows, heads, tokens, width = keys.shape
        if self.memory is None:
            self.memory = keys.new_empty(2 * self.layers, rows, heads, self.slots, width)
        self.written = self.memory.narrow(3, self.used, tokens).unbind()
        self.used += tokens
        self.kept = self.memory.narrow(3, 0, self.used).unbind()


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; see `NARForImageGeneration.generate`.

    Raises:
        ValueError: for a setting outside its range.
    """

    guidance_scale: float
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale={self.guidance_scale} must be a number from 1, which is no guidance")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must not be negative; 0 takes the most likely token")
        if not isinstance(self.top_k, int) or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_k={self.top_k!r} must be a whole number from 0, top_p={self.top_p} above 0 and up to 1"
            )
        if not isinstance(self.cfg_interval, int) or self.cfg_interval < -1:
            raise ValueError(f"cfg_interval={self.cfg_interval!r} must be a number of tokens, or -1 for all")

    @property
    def guided(self) -> bool:
        """Whether there is a null condition beside each sample."""
        return self.guidance_scale != 1

    def check(self, model: NARForImageGeneration, generator: torch.Generator | None) -> None:
        """Raise `ValueError` if the model has no null condition to guide by, or the generator is elsewhere."""
        if self.guided and not model.config.has_null:
            raise ValueError(
                f"guidance_scale={self.guidance_scale}: this model was trained without a null condition "
                "(condition_dropout=0 or condition='none'); use guidance_scale=1"
            )
        if generator is not None and generator.device.type != model.device.type:
            raise ValueError(
                f"the generator is on {generator.device}, the model on {model.device}: "
                f"make it with torch.Generator({str(model.device)!r})"
            )

    def sampler(self, generator: torch.Generator | None) -> Sampler:
        """Temperature first, as in the authors' code."""
        processors: list[Any] = []
        if self.temperature not in (0, 1):
            processors.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        return Sampler(processors, self.temperature > 0, generator)


def resolve_grid(config: NARConfig, grid_size: tuple[int, ...] | None, *, warn: bool = False) -> tuple[int, ...]:
    """The grid of a call: the model's own, or with rotary positions another one with as many axes.

    Raises:
        ValueError: for another number of axes, an axis below 1, or another grid where positions are by place.
    """
    own = tuple(config.grid_size)
    sizes = own if grid_size is None else tuple(grid_size)
    check_sizes(sizes)
    if len(sizes) != len(own):
        raise ValueError(f"grid_size={sizes} must have {len(own)} axes, like the model's {own}")
    if sizes != own and config.position_type != "rope":
        raise ValueError(
            f"grid_size={sizes}: this model has {config.position_type} positions for {own} only; "
            "another grid takes rotary ones"
        )
    if sizes != own and warn:
        warnings.warn(f"grid_size={sizes}: the model was trained for {own}", stacklevel=4)
    return sizes


def decode_fronts(
    model: NARForImageGeneration,
    prefix: Tensor,
    valid: Tensor,
    sizes: tuple[int, ...],
    plans: tuple[tuple[Tensor, MixingPlan], ...],
    sampling: Sampling,
    generator: torch.Generator | None = None,
    *,
    output_logits: bool = False,
) -> NAROutput:
    """Decode one batch.

    Args:
        prefix: embeddings ``[rows, tokens, width]``; with guidance the null conditions are the second half of the rows.
        valid: bool ``[rows, tokens]``, False for padding.
        plans: see `front_plans`.
    """
    device, tokens, branches = prefix.device, prefix.shape[1], 1 + sampling.guided
    samples, cells = len(prefix) // branches, math.prod(sizes)
    cache = FrontCache(tokens + cells, len(model.model.layers))
    sampler, padded = sampling.sampler(generator), not bool(valid.all())
    ids = torch.zeros(samples, cells, dtype=torch.long, device=device)
    kept = torch.zeros(samples, cells, model.config.vocab_size, device=device) if output_logits else None
    places, embeddings, seen, decided = torch.arange(tokens, device=device), prefix, _prefix_mask(valid), 0
    # As in `Decoder.run`: what is returned is older than the mode, so that it can be trained on.
    with torch.inference_mode():
        for number, (front, plan) in enumerate(plans):
            states = model.model(embeddings, places, sizes, seen, cache)
            if number == 0:
                states = tuple(state[:, -1:] for state in states)
            logits = model.mixed_logits(states, plan)
            if kept is not None:
                kept[:, front] = logits[:samples]
            guided = sampling.guided and (sampling.cfg_interval == -1 or decided <= sampling.cfg_interval)
            drawn = draw(sampler, guide(logits, samples, sampling.guidance_scale if guided else 1.0))
            ids.index_copy_(1, front, drawn)
            # Whatever is in the cache is no farther from the first cell, so only padding is to be hidden.
            seen = F.pad(valid, (0, decided + len(front)), value=True)[:, None, None] if padded else None
            embeddings = model.model.tok_embeddings(drawn if branches == 1 else drawn.repeat(branches, 1))
            places, decided = tokens + front, decided + len(front)
    return NAROutput(
        sequences=ids.view(samples, *sizes),
        logits=None if kept is None else kept.view(samples, *sizes, -1),
        forward_passes=len(plans),
        tokens_per_pass=cells / len(plans),
    )


def raster_fronts(sizes: tuple[int, ...], device: torch.device | None = None) -> list[Tensor]:
    """Raster indices ``[n]`` of each front's cells."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    return [
        torch.tensor([sum(map(int.__mul__, cell, strides)) for cell in front], device=device) for front in fronts(sizes)
    ]


def _prefix_mask(valid: Tensor) -> Tensor | None:
    """Causal within the prefix, without padding: bool ``[rows, 1, tokens, tokens]``; a single token needs none."""
    tokens = valid.shape[1]
    if tokens == 1:
        return None
    square = torch.ones(tokens, tokens, dtype=torch.bool, device=valid.device)
    own = torch.eye(tokens, dtype=torch.bool, device=valid.device)
    return (square.tril() & valid[:, None] | own)[:, None]


def guide(logits: Tensor, samples: int, scale: float) -> Tensor:
    """u + g (c - u), on logits as in the authors' code; without guidance the conditional half."""
    if scale == 1:
        return logits[:samples]
    conditional, unconditional = logits.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def draw(sampler: Sampler, scores: Tensor) -> Tensor:
    """Ids ``[samples, cells]``.

    Raises:
        ValueError: for scores that nothing can be drawn by.
    """
    flat = scores.flatten(0, 1)
    for processor in sampler.processors:
        flat = processor(None, flat)
    if sampler.do_sample and not math.isfinite(flat.amax(-1).sum().item()):
        raise ValueError("the logits of a cell are infinite or not a number; check the weights and their precision")
    return sampler.draw(flat.view_as(scores))

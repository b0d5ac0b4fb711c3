"""What NAR is compared with, of the same backbone: PAR's parallel order (arXiv 2412.15119), and raster for videos."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.grids.llamagen import LlamaGen, LlamaGenConfig
from tersor.grids.nar.decoding import FrontCache, NAROutput, Sampling, draw, guide
from tersor.grids.nar.heads import NARImageOutput


@cache
def par_groups(rows: int, columns: int, regions: tuple[int, int] = (2, 2)) -> tuple[tuple[int, ...], ...]:
    """Raster indices of the cells that each pass of PAR decides.

    The image is cut into so many ``regions`` from top to bottom and from left to right. Their first tokens come one by
    one, then a pass decides the next token of every part, each part in raster order.

    Raises:
        ValueError: for sides that the regions do not divide.
    """
    down, across = regions
    if min(regions) < 1 or rows % down or columns % across:
        raise ValueError(f"grid {(rows, columns)} must be a multiple of regions={regions}")
    height, width = rows // down, columns // across
    corners = [
        row * height * columns + column * width for row in range(down) for column in range(across)
    ]  # of the parts, in raster order
    inside = [row * columns + column for row in range(height) for column in range(width)]
    groups = [tuple(corner + cell for corner in corners) for cell in inside]
    return (*((cell,) for cell in groups[0]), *groups[1:])


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
        #: See `par_groups`, which refuses regions that do not fit the grid.
        self.groups = par_groups(rows, columns, (config.regions[0], config.regions[1]))
        self.transition = nn.Parameter(torch.empty(math.prod(config.regions) - 1, config.hidden_size))
        nn.init.normal_(self.transition, std=config.initializer_range)

    def forward(  # type: ignore[override]  # the whole image at once; its passes use the parent's
        self, input_ids: Tensor, class_labels: Tensor | None = None, labels: Tensor | None = None
    ) -> NARImageOutput:
        """Logits ``[batch, cells, vocabulary]`` in raster order, and a loss with ``labels``.

        Args:
            input_ids: all cells' ids in raster order, ``[batch, cells]`` or ``[batch, rows, columns]``.
        """
        ids = input_ids.flatten(1)
        dropped = None
        if self.training and self.config.condition_dropout > 0:
            dropped = torch.rand(len(ids), device=ids.device) < self.config.condition_dropout
        prefix, _ = self.condition(class_labels, dropped=dropped)
        fed = [self.fed(number, ids) for number in range(1, len(self.groups))]
        embeddings = torch.cat([prefix, *(each for each, _ in fed)], dim=1)
        places = torch.cat([torch.zeros(1, dtype=torch.long, device=ids.device), *(each for _, each in fed)])
        # A pass sees itself and what comes before it.
        passes = torch.cat([torch.full((len(group),), number) for number, group in enumerate(self.groups)])
        visible = (passes <= passes[:, None]).to(ids.device)
        mask = torch.zeros(visible.shape, device=ids.device).masked_fill_(~visible, torch.finfo(self.dtype).min)
        decided = torch.tensor([cell for group in self.groups for cell in group], device=ids.device)
        found = super().forward(
            inputs_embeds=embeddings, position_ids=places[None], attention_mask=mask[None, None].to(embeddings.dtype)
        )
        logits = torch.empty_like(found.logits)
        logits[:, decided] = found.logits
        if labels is None:
            return NARImageOutput(logits=logits.float())
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        return NARImageOutput(loss=loss, logits=logits.float())

    def fed(self, number: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What pass ``number`` (from 1 on) feeds: embeddings ``[batch, tokens, width]`` and positions ``[tokens]``.

        Args:
            ids: ``[batch, cells]``, decided as far as the passes before.
        """
        before, single = self.groups[number - 1], math.prod(self.config.regions)
        if number != single:
            cells = torch.tensor(before, device=ids.device)
            return self.tok_embeddings(ids[:, cells]), self.config.condition_tokens + cells
        # From here on each part has a token of its own; of the first ones only the last has not been fed.
        cells = torch.tensor([group[0] for group in self.groups[:single]], device=ids.device)
        last = self.tok_embeddings(ids[:, cells[-1:]])
        learned = self.transition.to(last.dtype).expand(len(ids), -1, -1)
        return torch.cat([learned, last], dim=1), self.config.condition_tokens + cells

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
        sampler, batch = sampling.sampler(generator), len(class_labels)
        rows, columns = self.config.grid_size
        kept = FrontCache(1 + rows * columns, len(self.layers))
        embeddings, _ = self.condition(class_labels, guided=sampling.guided)
        places = torch.zeros(1, dtype=torch.long, device=embeddings.device)
        ids = torch.zeros(batch, rows * columns, dtype=torch.long, device=embeddings.device)
        with torch.inference_mode():  # as NAR's, which it is compared with
            for number, group in enumerate(self.groups):
                if number:
                    embeddings, places = self.fed(number, ids)
                    embeddings = embeddings.repeat(1 + sampling.guided, 1, 1)
                # All that is in the cache is visible, as are the tokens of a pass to each other.
                mask = embeddings.new_zeros(1, 1, len(places), kept.get_seq_length() + len(places))
                out = super().forward(
                    inputs_embeds=embeddings, position_ids=places[None], attention_mask=mask, past_key_values=kept
                )
                ids[:, list(group)] = draw(sampler, guide(out.logits.float(), batch, scale))
        return NAROutput(sequences=ids.view(batch, rows, columns), forward_passes=len(self.groups))


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

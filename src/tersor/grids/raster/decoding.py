"""A raster model as the one decoder reads it: tokens are fed by place, and a token's logits are those of the next cell.

`RasterDecoder` has what ZipAR and speculative decoding share; each of them adds its steps and how it chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from tersor.grids.decoding import Ready, decode
from tersor.grids.geometry import RasterGrid
from tersor.grids.raster.adapters import Prefix, RasterAdapter
from tersor.grids.raster.slots import Slots, max_fed_tokens
from tersor.grids.sampling import Sampler, guide


@dataclass
class Decoded:
    """An image and what it took.

    Args:
        ids: ``[batch, rows * stride]`` in raster order, end-of-row tokens in place.
        scores: Processed scores ``[batch, vocabulary]`` of each cell, in raster order; empty unless asked for.
        forward_passes: The prefix's pass counts.
        row_start_pass: The pass that decided each row's first token.
    """

    ids: Tensor
    scores: tuple[Tensor, ...] = ()
    forward_passes: int = 0
    row_start_pass: list[int] = field(default_factory=list)


class RasterDecoder:
    """Decodes one batch of images; everything that a run changes lives here, nothing on the model.

    It is a reader of `tersor.grids.decoding.decode`. A subclass adds `steps`, `choose` and `statistics`.

    Args:
        adapter: Feeds the model.
        prefix: What the images are conditioned on.
        grid: Of the images.
        sampler: Draws.
        cache: Empty.
        eol_id: Id of the end-of-row token, where the grid has one.
        guidance: Scale g of ``u + g (c - u)``; then the prefix has twice as many rows as there are images.
        guided_cells: Cells that have more than so many before them are not guided; -1 guides all.
        pad_id: Stands for undecided cells in what processors see.
        keep_scores: Whether processed scores are returned.
        before_pass: Called before each forward with what is decided so far; it may raise to stop.
    """

    def __init__(
        self,
        adapter: RasterAdapter,
        prefix: Prefix,
        grid: RasterGrid,
        sampler: Sampler,
        cache: Cache,
        *,
        eol_id: int | None = None,
        guidance: float | None = None,
        guided_cells: int = -1,
        pad_id: int = 0,
        keep_scores: bool = False,
        before_pass: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.adapter, self.prefix, self.grid, self.sampler = adapter, prefix, grid, sampler
        self.cache, self.slots = cache, Slots(cache, prefix.valid, max_fed_tokens(grid))
        self.starts = prefix.starts[:, None]
        self.guidance, self.guided_cells, self.before_pass = guidance, guided_cells, before_pass
        self.branches = 1 if guidance is None else 2
        batch = prefix.valid.shape[0] // self.branches
        self.image = torch.full((batch, grid.length), pad_id, dtype=torch.long, device=prefix.valid.device)
        if eol_id is not None:
            self.image[:, grid.columns :: grid.stride] = eol_id
        allowed = adapter.allowed_ids
        self.allowed = None if allowed is None else torch.tensor(allowed, device=prefix.valid.device)
        self.scores: dict[tuple[int, ...], Tensor] | None = {} if keep_scores else None
        self.row_start_pass = [0] * grid.rows
        self.fed_tokens = 0

    def steps(self) -> Iterable[Ready]:
        """The passes, on the device; each may follow from what the one before gave."""
        raise NotImplementedError

    def choose(self, ready: Ready, logits: Tensor, ids: Tensor) -> Tensor:
        """See `tersor.grids.decoding.Reader`."""
        raise NotImplementedError

    def statistics(self, decoded: Decoded) -> dict[str, Any]:
        """What a run took, for the output object."""
        return {
            "forward_passes": decoded.forward_passes,
            "tokens_per_pass": self.grid.rows * self.grid.columns / decoded.forward_passes,
            "fed_tokens": self.fed_tokens,
            "row_start_pass": decoded.row_start_pass,
        }

    def run(self) -> Decoded:
        """Decode the whole image."""
        passes = decode(self, self.steps(), self.image, self.before_pass)
        # Scores are made in inference mode; copies can be trained on.
        kept = () if self.scores is None else tuple(self.scores[cell].clone() for cell in self.grid.cells())
        return Decoded(self.image, kept, passes, self.row_start_pass)

    def logits(self, ready: Ready, ids: Tensor) -> Tensor:
        """See `tersor.grids.decoding.Reader`."""
        prefix = self.prefix
        if ready.number == 0:
            mask = self.slots.prefix_mask(prefix.embeddings.dtype)
            last = [prefix.valid.shape[1] - 1]
            return self.adapter.logits(prefix.embeddings, prefix.positions, mask, self.cache, last)
        self.fed_tokens += len(ready.step.fed)
        fed = ids.index_select(1, ready.sources)
        embeddings = self.adapter.embed_image(fed if self.branches == 1 else fed.repeat(self.branches, 1))
        positions = self.starts + ready.fed
        mask = self.slots.feed(ready.fed, ready.step.fed, embeddings.dtype)
        return self.adapter.logits(embeddings, positions, mask, self.cache, [*ready.step.keep])

    def process(self, ready: Ready, logits: Tensor, ids: Tensor, *, check: bool = True) -> Tensor:
        """Scores ``[batch, cells, vocabulary]`` of the pass's cells: guided, of allowed ids only, processed."""
        step = ready.step
        logits = self.restrict(logits.float(), len(ids), step.cells)
        # The virtual raster prefix of a cell: its length is right, undecided cells hold the pad id or a draft.
        scores = self.sampler.process(
            logits,
            step.cells,
            lambda index: torch.cat([self.prefix.ids, ids[:, : step.targets[index]]], dim=1),
            check=check,
        )
        if self.scores is not None:
            self.scores |= {cell: scores[:, index] for index, cell in enumerate(step.cells)}
        return scores

    def restrict(self, logits: Tensor, images: int, cells: Sequence[tuple[int, ...]] = ()) -> Tensor:
        """Guided logits of allowed ids only.

        Args:
            logits: Float32 ``[rows, cells, vocabulary]``.
            images: How many rows are conditional.
            cells: Coordinates; needed where guidance ends.
        """
        if self.guidance is not None:
            # As the library's own guidance has it; raw logits differ from this by a constant a row.
            logits = logits.log_softmax(-1)
            guided = guide(logits, images, self.guidance)
            if self.guided_cells != -1:
                before = torch.tensor([row * self.grid.columns + column for row, column in cells])
                late = (before > self.guided_cells).to(logits.device)
                guided = torch.where(late[:, None], logits[:images], guided)
            logits = guided
        if self.allowed is not None:
            kept = logits.index_select(-1, self.allowed)
            logits = torch.full_like(logits, -torch.inf).index_copy_(-1, self.allowed, kept)
        return logits

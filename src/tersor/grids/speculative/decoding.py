"""Speculative Jacobi decoding: drafts of a window of cells are tested in one pass, and tested again until decided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from tersor.grids.decoding import Ready
from tersor.grids.geometry import RasterGrid
from tersor.grids.raster.adapters import Prefix, RasterAdapter
from tersor.grids.raster.decoding import Decoded, RasterDecoder
from tersor.grids.sampling import Sampler
from tersor.grids.speculative.config import SpeculativeConfig
from tersor.grids.speculative.draws import Coupled, Grouped, SeedExact
from tersor.grids.speculative.schedule import Window


class SpeculativeDecoder(RasterDecoder):
    """Decodes one batch of images in lock-step: all of them decide as many cells a pass as the slowest one can.

    After a pass each tested cell holds a token that follows the distribution of this pass. Up to the first one that
    changed they are decided, because what they were computed from is. All later ones are drafts of the next pass.

    Args:
        config: Settings.
        grid: See `RasterDecoder`.
        adapter: See `RasterDecoder`.
        prefix: See `RasterDecoder`.
        sampler: See `RasterDecoder`.
        cache: See `RasterDecoder`.
        **options: See `RasterDecoder`.
    """

    def __init__(
        self,
        config: SpeculativeConfig,
        grid: RasterGrid,
        adapter: RasterAdapter,
        prefix: Prefix,
        sampler: Sampler,
        cache: Cache,
        **options: Any,
    ) -> None:
        super().__init__(adapter, prefix, grid, sampler, cache, **options)
        self.first_drafts = config.first_drafts
        size = config.window(grid, self.image.device.type, len(prefix.valid))
        self.window = Window(grid, size, above=config.first_drafts in ("above", "law above"))
        self.draws = self._draws(config.mode)
        # The latest distributions of cells, from `self.begin` on; None where nothing asks for them.
        self.laws: Tensor | None = None
        self.begin = 0
        self.keeps_laws = self.draws.keeps_laws or config.first_drafts.startswith("law")
        self.vocabulary = 0
        self.cells_per_pass: list[int] = []
        self.kept: list[Tensor] = []

    def _draws(self, mode: str) -> SeedExact:
        """How drafts are tested; greedy decoding has one way."""
        if mode == "seed" or not self.sampler.do_sample:
            return SeedExact(self.sampler)
        return Coupled(self.sampler) if mode == "law" else Grouped(self.sampler, self._embed)

    def _embed(self, entries: Tensor) -> Tensor:
        return self.adapter.embed_image(self._ids(entries))

    def _ids(self, entries: Tensor) -> Tensor:
        """Ids of the model by their numbers among those that a cell may hold."""
        return entries if self.allowed is None else self.allowed[entries]

    def _entries(self, ids: Tensor) -> Tensor:
        """The other way round."""
        return ids if self.allowed is None else torch.searchsorted(self.allowed, ids)

    @property
    def width(self) -> int:
        """How many ids a cell may hold."""
        return self.vocabulary if self.allowed is None else len(self.allowed)

    def steps(self) -> Iterator[Ready]:
        """See `RasterDecoder`."""
        decided = 0
        for number in count():
            if (step := self.window.advance(decided)) is None:
                return
            if number and self.window.new:
                self._draft(self.window.new, self.window.origins)
            yield Ready.of(number, step, self.image.device)
            decided = self.cells_per_pass[-1]

    def _draft(self, cells: range, origins: Sequence[int]) -> None:
        """Give cells their first drafts."""
        images, device = len(self.image), self.image.device
        self._enter(cells)

        def on_device(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, device=device)

        law, width = None, self.width
        if self.first_drafts.startswith("law"):
            assert self.laws is not None
            law = self.laws.index_select(1, on_device([each - self.begin for each in origins]))
            drafts = self.draws.draw(law)
        elif self.first_drafts == "random":
            drafts = self.draws.random(images, len(cells), width, device)
        else:
            drafts = self._entries(self.image.index_select(1, on_device([*map(self.window.place, origins)])))
        self.image.index_copy_(1, on_device([*map(self.window.place, cells)]), self._ids(drafts))
        if self.laws is None:
            return
        if self.first_drafts == "random":
            law = self.laws.new_full((images, len(cells), width), 1 / width)
        elif law is None:
            law = F.one_hot(drafts, width).to(self.laws.dtype)
        self.laws = torch.cat([self.laws, law], dim=1)

    def _enter(self, cells: range) -> None:
        like = torch.empty(len(self.image), self.vocabulary, device=self.image.device)
        last = self.grid.columns - 1
        for cell in cells:
            self.draws.enter(like, self.allowed, ends_row=self.grid.end_of_row and cell % self.grid.columns == last)

    def choose(self, ready: Ready, logits: Tensor, ids: Tensor) -> Tensor:
        """See `tersor.grids.decoding.Reader`."""
        # After a wrong draft processors may leave no token; that is checked for what is decided.
        scores = self.process(ready, logits, ids, check=False)
        law = self.law(scores)
        if ready.number == 0:
            self.vocabulary = scores.shape[-1]
            self._enter(self.window.tested)
            found = self.draws.draw(law)
            self._decide(ready, scores, law, torch.zeros_like(found, dtype=torch.bool))
            return self._ids(found)
        drafts = self._entries(ids.index_select(1, ready.targets))
        before = None if self.laws is None else self.laws[:, self.window.decided - self.begin :]
        found = self.draws.test(law, drafts, before)
        self._decide(ready, scores, law, found == drafts)
        return self._ids(found)

    def law(self, scores: Tensor) -> Tensor:
        """The distributions of cells over the ids that they may hold; any id where nothing is left."""
        law = self.sampler.probabilities(scores)
        if self.allowed is not None:
            law = law.index_select(-1, self.allowed)
        return law.nan_to_num(1 / law.shape[-1])

    def _decide(self, ready: Ready, scores: Tensor, law: Tensor, kept: Tensor) -> None:
        """Count what is decided: all up to the first cell that changed in some image, and that cell.

        Args:
            ready: The pass.
            scores: Of the tested cells ``[images, cells, vocabulary]``.
            law: Distributions of the tested cells ``[images, cells, ids]``.
            kept: Bool ``[images, cells]``, which of them hold what they held.
        """
        window, columns = self.window, self.grid.columns
        agreed = int(kept.all(0).cumprod(0).sum())
        number = min(agreed + 1, len(window.tested))
        self.sampler.check(scores[:, :number], ready.step.cells)
        self.cells_per_pass.append(number)
        self.kept.append(kept[:, :number])
        self.draws.leave(number)
        for cell in window.tested[:number]:
            if cell % columns == 0:
                self.row_start_pass[cell // columns] = ready.number + 1
        if not self.keeps_laws:
            return
        # The law that a token now follows is this pass's, of kept ones too: with the old one a test would be biased.
        laws = law if self.laws is None else torch.cat([self.laws[:, : window.decided - self.begin], law], dim=1)
        rows_back = columns if self.first_drafts.startswith("law") else 0
        begin = max(self.begin, window.decided + number - rows_back)
        self.laws, self.begin = laws[:, begin - self.begin :], begin

    def statistics(self, decoded: Decoded) -> dict[str, Any]:
        """See `RasterDecoder`."""
        kept = torch.cat(self.kept, dim=1).float().mean(0).view(self.grid.rows, self.grid.columns)
        return {
            **super().statistics(decoded),
            "cells_per_pass": self.cells_per_pass,
            "acceptance": kept.mean(1).tolist(),
        }

"""ZipAR's decoder: a raster model's tokens are fed by place, rows run ahead, and a row's first token may be a trial."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from tersor.grids.decoding import Ready, decode, ready_steps
from tersor.grids.geometry import Cell, RasterGrid
from tersor.grids.sampling import Sampler, guide
from tersor.grids.schedule import Frontier, ZipARSchedule
from tersor.grids.zipar.adapters import Prefix, RasterAdapter
from tersor.grids.zipar.slots import Slots


@dataclass
class Trial:
    """A row's first token under the adaptive window: a candidate, and the distribution that it follows.

    Args:
        ids: The candidates, ``[batch]``.
        distribution: What they follow, float32 ``[batch, vocabulary]``.
        accepted: Bool ``[batch]``.
    """

    ids: Tensor
    distribution: Tensor
    accepted: Tensor

    def verify(self, distribution: Tensor, generator: torch.Generator | None) -> Trial:
        """Accept each candidate y with probability min(1, p(y) / q(y)), else draw it anew from max(0, p - q).

        Either way an id follows ``distribution``, p, if it followed q before. Accepted samples stay as they are.
        """
        p, q = distribution, self.distribution
        drawn, expected = (each.gather(-1, self.ids[:, None]).squeeze(-1) for each in (p, q))
        ratio = torch.where(expected > 0, drawn / expected.clamp_min(torch.finfo(q.dtype).tiny), torch.inf)
        uniform = torch.rand(ratio.shape, generator=generator, device=ratio.device)
        rest = (p - q).clamp_min(0)
        same = rest.sum(-1) < 1e-12
        accepted = self.accepted | (uniform < ratio) | same
        if bool(accepted.all()):
            return Trial(self.ids, self.distribution, accepted)
        # Rows that are accepted need some distribution too; what is drawn for them is not used.
        again = torch.multinomial(torch.where(same[:, None], p, rest), 1, generator=generator).squeeze(-1)
        return Trial(
            torch.where(accepted, self.ids, again), torch.where(accepted[:, None], self.distribution, p), accepted
        )


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


class Decoder:
    """Decodes one batch of images; everything that a run changes lives here, nothing on the model.

    It is a reader of `tersor.grids.decoding.decode`: a token's logits are those of the cell after it.

    Args:
        adapter: Feeds the model.
        prefix: What the images are conditioned on.
        frontier: The order, at its start.
        sampler: Draws.
        cache: Empty.
        eol_id: Id of the end-of-row token, where the grid has one.
        guidance: Scale g of ``u + g (c - u)``; then the prefix has twice as many rows as there are images.
        pad_id: Stands for undecided cells in what processors see.
        keep_scores: Whether processed scores are returned.
        before_pass: Called before each forward with what is decided so far; it may raise to stop.
    """

    def __init__(
        self,
        adapter: RasterAdapter,
        prefix: Prefix,
        frontier: Frontier,
        sampler: Sampler,
        cache: Cache,
        *,
        eol_id: int | None = None,
        guidance: float | None = None,
        pad_id: int = 0,
        keep_scores: bool = False,
        before_pass: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.adapter, self.prefix, self.frontier, self.sampler = adapter, prefix, frontier, sampler
        self.cache, self.slots = cache, Slots(cache, prefix.valid, max_fed_tokens(frontier.grid))
        self.starts = prefix.starts[:, None]
        self.guidance, self.before_pass = guidance, before_pass
        self.branches = 1 if guidance is None else 2
        batch = prefix.valid.shape[0] // self.branches
        grid = frontier.grid
        self.image = torch.full((batch, grid.length), pad_id, dtype=torch.long, device=prefix.valid.device)
        if eol_id is not None:
            self.image[:, grid.columns :: grid.stride] = eol_id
        allowed = adapter.allowed_ids
        self.allowed = None if allowed is None else torch.tensor(allowed, device=prefix.valid.device)
        self.scores: dict[tuple[int, ...], Tensor] | None = {} if keep_scores else None
        self.row_start_pass = [0] * grid.rows
        self.trial: Trial | None = None
        self.trial_cell: Cell | None = None
        self.accepted = False

    def run(self) -> Decoded:
        """Decode the whole image."""
        passes = decode(self, self._steps(), self.image, self.before_pass)
        # Scores are made in inference mode; copies can be trained on.
        kept = () if self.scores is None else tuple(self.scores[cell].clone() for cell in self.frontier.grid.cells())
        return Decoded(self.image, kept, passes, self.row_start_pass)

    def _steps(self) -> Iterable[Ready]:
        """A fixed window's passes are always the same; the adaptive one's follow from what was accepted."""
        frontier, device = self.frontier, self.image.device
        if not frontier.adaptive:
            yield from ready_steps(ZipARSchedule(frontier.grid, frontier.window, frontier.row_start), device)
            return
        for number in count():
            if (step := frontier.advance(accepted=self.accepted)) is None:
                return
            self.trial_cell = step.trial
            yield Ready.of(number, step.step(frontier.grid), device)

    def logits(self, ready: Ready, ids: Tensor) -> Tensor:
        """See `tersor.grids.decoding.Reader`."""
        prefix = self.prefix
        if ready.number == 0:
            mask = self.slots.prefix_mask(prefix.embeddings.dtype)
            last = [prefix.valid.shape[1] - 1]
            return self.adapter.logits(prefix.embeddings, prefix.positions, mask, self.cache, last)
        fed = ids.index_select(1, ready.sources)
        embeddings = self.adapter.embed_image(fed if self.branches == 1 else fed.repeat(self.branches, 1))
        positions = self.starts + ready.fed
        mask = self.slots.feed(ready.fed, ready.step.fed, embeddings.dtype)
        return self.adapter.logits(embeddings, positions, mask, self.cache, [*ready.step.keep])

    def choose(self, ready: Ready, logits: Tensor, ids: Tensor) -> Tensor:
        """See `tersor.grids.decoding.Reader`."""
        step, logits = ready.step, logits.float()
        if self.guidance is not None:
            # As the library's own guidance has it; raw logits differ from this by a constant a row.
            logits = guide(logits.log_softmax(-1), len(ids), self.guidance)
        if self.allowed is not None:
            kept = logits.index_select(-1, self.allowed)
            logits = torch.full_like(logits, -torch.inf).index_copy_(-1, self.allowed, kept)
        # The virtual raster prefix of a cell: its length is right, undecided cells hold the pad id.
        scores = self.sampler.process(
            logits, step.cells, lambda index: torch.cat([self.prefix.ids, ids[:, : step.targets[index]]], dim=1)
        )
        drawn = self.sampler.draw(scores)
        # A row's first token is the lowest of the pass, so it comes last.
        row, column = step.cells[-1]
        if column == 0:
            tried = (row, 0) == self.trial_cell
            self.accepted = not tried
            if tried or self.trial is not None:
                drawn[:, -1], self.accepted = self._try(drawn[:, -1], scores[:, -1], final=not tried)
            if self.accepted:
                self.row_start_pass[row] = ready.number + 1
        if self.scores is not None:
            self.scores |= {cell: scores[:, index] for index, cell in enumerate(step.cells)}
        return drawn

    def _try(self, candidate: Tensor, scores: Tensor, *, final: bool) -> tuple[Tensor, bool]:
        """One step of the adaptive window: the candidate at first, a verification of the first one later.

        Args:
            candidate: Ids ``[batch]`` drawn from ``scores``.
            final: The row above is complete, so that whatever the last step holds is taken.
        """
        distribution = self.sampler.probabilities(scores)
        if self.trial is None:
            self.trial = Trial(candidate, distribution, torch.zeros_like(candidate, dtype=torch.bool))
        else:
            self.trial = self.trial.verify(distribution, self.sampler.generator)
        trial, done = self.trial, final or bool(self.trial.accepted.all())
        if done:
            self.trial = None
        return trial.ids, done


def max_fed_tokens(grid: RasterGrid) -> int:
    """Image tokens that are ever fed: all but the last cell and the end of its row."""
    return grid.length - grid.end_of_row - 1


def statistics(decoded: Decoded, grid: RasterGrid) -> dict[str, Any]:
    """What a run took, for the output object."""
    starts = decoded.row_start_pass
    return {
        "forward_passes": decoded.forward_passes,
        "tokens_per_pass": grid.rows * grid.columns / decoded.forward_passes,
        "row_start_pass": starts,
        "window_used": [0, *(later - earlier for earlier, later in pairwise(starts))],
    }

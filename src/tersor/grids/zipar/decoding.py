"""ZipAR's decoder: rows run ahead, and a row's first token may be a trial."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from tersor.grids.decoding import Ready, ready_steps
from tersor.grids.geometry import Cell
from tersor.grids.raster.adapters import Prefix, RasterAdapter
from tersor.grids.raster.decoding import Decoded, RasterDecoder
from tersor.grids.sampling import Sampler, stays
from tersor.grids.schedule import Frontier, ZipARSchedule


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
        accepted = self.accepted | stays(drawn, expected, generator)
        rest = (p - q).clamp_min(0)
        same = rest.sum(-1) < 1e-12
        accepted |= same
        if bool(accepted.all()):
            return Trial(self.ids, self.distribution, accepted)
        # Rows that are accepted need some distribution too; what is drawn for them is not used.
        again = torch.multinomial(torch.where(same[:, None], p, rest), 1, generator=generator).squeeze(-1)
        return Trial(
            torch.where(accepted, self.ids, again), torch.where(accepted[:, None], self.distribution, p), accepted
        )


class Decoder(RasterDecoder):
    """Decodes one batch of images in ZipAR's order.

    Args:
        adapter: See `RasterDecoder`.
        prefix: See `RasterDecoder`.
        frontier: The order, at its start.
        sampler: See `RasterDecoder`.
        cache: See `RasterDecoder`.
        **options: See `RasterDecoder`.
    """

    def __init__(
        self,
        adapter: RasterAdapter,
        prefix: Prefix,
        frontier: Frontier,
        sampler: Sampler,
        cache: Cache,
        **options: Any,
    ) -> None:
        super().__init__(adapter, prefix, frontier.grid, sampler, cache, **options)
        self.frontier = frontier
        self.trial: Trial | None = None
        self.trial_cell: Cell | None = None
        self.accepted = False

    def steps(self) -> Iterable[Ready]:
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

    def choose(self, ready: Ready, logits: Tensor, ids: Tensor) -> Tensor:
        """See `tersor.grids.decoding.Reader`."""
        step, scores = ready.step, self.process(ready, logits, ids)
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
            self.trial = self.trial.verify(distribution, self.sampler.shared_generator)
        trial, done = self.trial, final or bool(self.trial.accepted.all())
        if done:
            self.trial = None
        return trial.ids, done

    def statistics(self, decoded: Decoded) -> dict[str, Any]:
        """See `RasterDecoder`."""
        starts = decoded.row_start_pass
        later = [after - before for before, after in pairwise(starts)]
        return {**super().statistics(decoded), "window_used": [0, *later]}

"""The decoder that runs a schedule on a model: positions, mask, cache slots, guidance and drawing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import StaticCache
from transformers.generation import logits_process

from tersor.grids.geometry import Cell, RasterGrid
from tersor.grids.schedule import Feed, Frontier, Pass

if TYPE_CHECKING:
    from transformers import Cache

    from tersor.grids.adapters import RasterAdapter

# An offset that no query reaches: stale and unwritten slots.
_NEVER = sys.maxsize
# They read nothing but scores, so that all rows of a pass go through them at once.
_SCORES_ONLY = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "SuppressTokensLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
    )
)


@dataclass(frozen=True)
class Prefix:
    """What the image is conditioned on; with guidance the unconditional branch follows as further rows.

    Args:
        embeddings: ``[rows, tokens, width]``, padded on the left.
        valid: bool ``[rows, tokens]``, False for padding.
        positions: ``[rows, tokens]``.
        starts: ``[rows]``, the position of the first image token.
        ids: ``[batch, tokens]`` that come before the image in what processors see and what is returned; no tokens
            where the image's ids are a vocabulary of their own.
    """

    embeddings: Tensor
    valid: Tensor
    positions: Tensor
    starts: Tensor
    ids: Tensor

    @classmethod
    def padded(cls, embeddings: Tensor, valid: Tensor, ids: Tensor) -> Prefix:
        """Positions as the library counts them: from 0 at each row's first token that is no padding."""
        positions = (valid.long().cumsum(-1) - 1).clamp_min(0)
        return cls(embeddings, valid, positions, valid.sum(-1), ids)


class Slots:
    """Which image token each cache slot holds. Slots are appended in feed order, after the prefix's.

    A fed token attends to the whole prefix, and to every slot whose offset is not above its own: decided tokens
    of rows above, and its own row up to itself.

    Args:
        offsets: ``[rows, slots]``, or one row for all where no prefix is padded; -1 for the prefix.
        stale: how many of them are hidden for ever.
        most: slots that the model can look at, or None.
    """

    def __init__(self, cache: Cache, valid: Tensor, most: int | None = None) -> None:
        self.cache, self.valid, self.most = cache, valid, most
        prefix = torch.where(valid, -1, _NEVER)
        self.offsets = prefix[:1] if bool(valid.all()) else prefix
        self.stale = 0
        self.capacity = cache.layers[0].max_cache_len if isinstance(cache, StaticCache) else None

    def drop(self, offsets: tuple[int, ...]) -> None:
        """Hide the slots that hold ``offsets``."""
        if offsets:
            stale = torch.isin(self.offsets, torch.tensor(offsets, device=self.offsets.device))
            self.offsets = self.offsets.masked_fill(stale, _NEVER)
            self.stale += len(offsets)

    def _remove_stale(self) -> None:
        kept = (self.offsets != _NEVER).any(0).nonzero()[:, 0]
        for layer in self.cache.layers:
            layer.keys, layer.values = (
                states.index_select(-2, kept.to(states.device)) for states in (layer.keys, layer.values)
            )
        self.offsets, self.stale = self.offsets[:, kept], 0

    def prefix_mask(self, dtype: torch.dtype) -> Tensor:
        """Causal within the prefix, without padding: additive ``[rows, 1, tokens, slots]``."""
        rows, tokens = self.valid.shape
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=self.valid.device).tril()
        # Padding sees itself: a row without any visible key would give NaN in half precision.
        own = torch.eye(tokens, dtype=torch.bool, device=self.valid.device)
        visible = causal & self.valid[:, None, :] | own
        if self.capacity is not None:
            visible = F.pad(visible, (0, self.capacity - tokens))
        return _additive(visible, dtype).view(rows, 1, tokens, -1)

    def append(self, offsets: Tensor, dtype: torch.dtype) -> Tensor:
        """Add slots for the tokens of a pass; returns their additive mask ``[rows or 1, 1, queries, slots]``.

        Removing hidden slots copies the cache, so that waits until they are an eighth of it. A static one keeps them.

        Args:
            offsets: ``[queries]``.
        """
        held = self.offsets.shape[1]
        full = self.most is not None and held + len(offsets) > self.most
        if self.stale and self.capacity is None and (full or 8 * self.stale >= held):
            self._remove_stale()
        self.offsets = torch.cat([self.offsets, offsets.expand(len(self.offsets), -1)], dim=1)
        visible = self.offsets[:, None] <= offsets[:, None]
        if self.capacity is not None:
            visible = F.pad(visible, (0, self.capacity - visible.shape[-1]))
        return _additive(visible, dtype)[:, None]


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Eager attention adds its mask, so a bool one would be right for sdpa only."""
    hidden = torch.tensor(torch.finfo(dtype).min, dtype=dtype, device=visible.device)
    return torch.where(visible, hidden.new_zeros(()), hidden)


@dataclass
class Sampler:
    """Draws tokens with the user's processors.

    Args:
        processors: called as ``processor(ids, scores)``; ids are the virtual raster prefix of the cell.
        do_sample: draw from the distribution, or take its largest entry.
        generator: of the draws; None is the global state, as in the library's own sampling.
    """

    processors: list[Callable[[Tensor | None, Tensor], Tensor]]
    do_sample: bool
    generator: torch.Generator | None = None

    def process(self, scores: Tensor, cells: tuple[Cell, ...], before: Callable[[Cell], Tensor]) -> Tensor:
        """Run the processors over ``[batch, cells, vocabulary]``.

        Args:
            before: the ids that precede a cell in raster order.

        Raises:
            ValueError: naming row and column, if they leave nothing to draw.
        """
        for processor in self.processors:
            if isinstance(processor, _SCORES_ONLY):
                scores = processor(None, scores.flatten(0, 1)).view_as(scores)
            else:
                scores = torch.stack(
                    [processor(before(cell), scores[:, i].contiguous()) for i, cell in enumerate(cells)], dim=1
                )
        possible = (scores > -torch.inf).any(-1)
        if not bool(possible.all()):
            row, column = cells[int((~possible).any(0).nonzero()[0, 0])]
            raise ValueError(
                f"the logits processors leave no token for row {row}, column {column} of the image: every score is "
                "minus infinity or not a number; check processors that constrain tokens"
            )
        return scores

    def probabilities(self, scores: Tensor) -> Tensor:
        """The law of the next token, float32; greedy decoding has all of it on one."""
        if self.do_sample:
            return scores.float().softmax(-1)
        return torch.zeros_like(scores, dtype=torch.float32).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)

    def draw(self, scores: Tensor) -> Tensor:
        """One id for each of ``[..., vocabulary]``."""
        if not self.do_sample:
            return scores.argmax(-1)
        law = self.probabilities(scores).flatten(0, -2)
        return torch.multinomial(law, 1, generator=self.generator).view(scores.shape[:-1])


@dataclass
class Trial:
    """A row's first token under the adaptive window: a candidate, and the law that it follows.

    Args:
        ids: ``[batch]``. law: ``[batch, vocabulary]``, float32. accepted: bool ``[batch]``.
    """

    ids: Tensor
    law: Tensor
    accepted: Tensor

    def verify(self, law: Tensor, generator: torch.Generator | None) -> Trial:
        """Accept each candidate y with probability min(1, p(y) / q(y)), else draw it anew from max(0, p - q).

        Either way an id follows ``law``, p, if it followed q before. Accepted samples stay as they are.
        """
        p, q = law, self.law
        drawn, expected = (each.gather(-1, self.ids[:, None]).squeeze(-1) for each in (p, q))
        ratio = torch.where(expected > 0, drawn / expected.clamp_min(torch.finfo(q.dtype).tiny), torch.inf)
        uniform = torch.rand(ratio.shape, generator=generator, device=ratio.device)
        rest = (p - q).clamp_min(0)
        same = rest.sum(-1) < 1e-12
        accepted = self.accepted | (uniform < ratio) | same
        if bool(accepted.all()):
            return Trial(self.ids, self.law, accepted)
        # Rows that are accepted need some law too; what is drawn for them is not used.
        again = torch.multinomial(torch.where(same[:, None], p, rest), 1, generator=generator).squeeze(-1)
        return Trial(torch.where(accepted, self.ids, again), torch.where(accepted[:, None], self.law, p), accepted)


@dataclass
class Decoded:
    """An image and what it took.

    Args:
        ids: ``[batch, rows * stride]`` in raster order, end-of-row tokens in place.
        scores: processed scores ``[batch, vocabulary]`` a cell, in raster order; empty unless asked for.
        forward_passes: the prefix's pass counts.
        row_start_pass: the pass that decided each row's first token.
    """

    ids: Tensor
    scores: tuple[Tensor, ...] = ()
    forward_passes: int = 0
    row_start_pass: list[int] = field(default_factory=list)


class Decoder:
    """Decodes one batch of images; everything that a run changes lives here, nothing on the model.

    Args:
        eol_id: id of the end-of-row token, where the grid has one.
        guidance: scale g of ``u + g (c - u)``; then the prefix has twice as many rows as there are images.
        pad_id: stands for undecided cells in what processors see.
        at_pass: called before each forward with what is decided so far; may raise to stop.
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
        at_pass: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.adapter, self.prefix, self.frontier, self.sampler = adapter, prefix, frontier, sampler
        self.cache, self.slots = cache, Slots(cache, prefix.valid, adapter.max_positions)
        self.guidance, self.at_pass = guidance, at_pass
        self.branches = 1 if guidance is None else 2
        batch = prefix.valid.shape[0] // self.branches
        grid = frontier.grid
        self.image = torch.full((batch, grid.length), pad_id, dtype=torch.long, device=prefix.valid.device)
        if eol_id is not None:
            self.image[:, grid.columns :: grid.stride] = eol_id
        allowed = adapter.allowed_ids
        self.allowed = None if allowed is None else torch.tensor(allowed, device=prefix.valid.device)
        self.scores: dict[Cell, Tensor] | None = {} if keep_scores else None
        self.trial: Trial | None = None

    def run(self) -> Decoded:
        """Decode the whole image."""
        grid = self.frontier.grid
        starts = [0] * grid.rows
        passes, accepted = 0, False
        while (step := self.frontier.advance(accepted=accepted)) is not None:
            if self.at_pass is not None:
                self.at_pass(self.image)
            passes += 1
            scores = self._scores(self._forward(step), step)
            accepted = self._decide(step, scores)
            for row, column in step.yields:
                if column == 0 and ((row, column) != step.trial or accepted):
                    starts[row] = passes
        kept = () if self.scores is None else tuple(self.scores[cell] for cell in grid.cells())
        return Decoded(self.image, kept, passes, starts)

    def _forward(self, step: Pass) -> Tensor:
        """Logits ``[rows, cells, vocabulary]`` of the cells that the pass yields."""
        prefix = self.prefix
        if not step.feeds:
            mask = self.slots.prefix_mask(prefix.embeddings.dtype)
            last = [prefix.valid.shape[1] - 1]
            return self.adapter.logits(prefix.embeddings, prefix.positions, mask, self.cache, last)
        self.slots.drop(step.replaced)
        offsets = torch.tensor([feed.offset for feed in step.feeds], device=prefix.starts.device)
        ids = self.image[:, [self._source(feed) for feed in step.feeds]]
        embeddings = self.adapter.embed_image(ids if self.branches == 1 else ids.repeat(self.branches, 1))
        positions = prefix.starts[:, None] + offsets
        mask = self.slots.append(offsets, embeddings.dtype)
        keep = [index for index, feed in enumerate(step.feeds) if feed.yields is not None]
        return self.adapter.logits(embeddings, positions, mask, self.cache, keep)

    def _source(self, feed: Feed) -> int:
        """Where in the image the token lies that is fed; end-of-row tokens lie there from the start."""
        return feed.offset if feed.source is None else self.frontier.grid.offset(*feed.source)

    def _scores(self, logits: Tensor, step: Pass) -> Tensor:
        """Guided, restricted to the image's ids, and processed: float32 ``[batch, cells, vocabulary]``."""
        logits = logits.float()
        if self.guidance is not None:
            # As the library's own guidance has it; raw logits differ from this by a constant a row.
            conditional, unconditional = logits.log_softmax(-1).chunk(2)
            logits = unconditional + self.guidance * (conditional - unconditional)
        if self.allowed is not None:
            kept = logits.index_select(-1, self.allowed)
            logits = torch.full_like(logits, -torch.inf).index_copy_(-1, self.allowed, kept)
        return self.sampler.process(logits, step.yields, self._before)

    def _before(self, cell: Cell) -> Tensor:
        """The virtual raster prefix of a cell; its length is right, undecided cells hold the pad id."""
        return torch.cat([self.prefix.ids, self.image[:, : self.frontier.grid.offset(*cell)]], dim=1)

    def _decide(self, step: Pass, scores: Tensor) -> bool:
        """Draw the pass's cells; returns whether its trial is accepted."""
        ids, accepted = self.sampler.draw(scores), False
        last = step.yields[-1]
        # A row's first token is the lowest of the pass, so it comes last.
        if last == step.trial or (self.trial is not None and last[1] == 0):
            ids[:, -1], accepted = self._try(ids[:, -1], scores[:, -1], final=last != step.trial)
        self.image[:, [self.frontier.grid.offset(*cell) for cell in step.yields]] = ids
        if self.scores is not None:
            self.scores |= {cell: scores[:, index] for index, cell in enumerate(step.yields)}
        return accepted

    def _try(self, candidate: Tensor, scores: Tensor, *, final: bool) -> tuple[Tensor, bool]:
        """One step of the adaptive window: the candidate at first, a verification of the first one later.

        Args:
            candidate: ids ``[batch]`` drawn from ``scores``.
            final: the row above is complete, so that whatever the last step holds is taken.
        """
        law = self.sampler.probabilities(scores)
        if self.trial is None:
            self.trial = Trial(candidate, law, torch.zeros_like(candidate, dtype=torch.bool))
        else:
            self.trial = self.trial.verify(law, self.sampler.generator)
        trial, done = self.trial, final or bool(self.trial.accepted.all())
        if done:
            self.trial = None
        return trial.ids, done


def slots_needed(prefix_tokens: int, grid: RasterGrid, frontier: Frontier) -> int:
    """Cache slots of a fixed window that never shrinks, stale proxies included."""
    used = prefix_tokens
    rehearsal = Frontier(grid, frontier.window, frontier.row_start)
    while (step := rehearsal.advance()) is not None:
        used += len(step.feeds)
    return used


def statistics(decoded: Decoded, grid: RasterGrid) -> dict[str, Any]:
    """What a run took, for the output object."""
    starts = decoded.row_start_pass
    return {
        "forward_passes": decoded.forward_passes,
        "tokens_per_pass": grid.rows * grid.columns / decoded.forward_passes,
        "row_start_pass": starts,
        "window_used": [0, *(later - earlier for earlier, later in pairwise(starts))],
    }

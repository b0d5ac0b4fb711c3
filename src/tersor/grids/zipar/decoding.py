"""The decoder that runs a schedule on a model: positions, mask, cache slots, guidance and drawing."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.generation import logits_process

from tersor.grids.geometry import Cell, RasterGrid
from tersor.grids.schedule import Frontier, Pass, RowStart, ZipARSchedule

if TYPE_CHECKING:
    from transformers import Cache

    from tersor.grids.zipar.adapters import RasterAdapter

# An offset that no query reaches: padding.
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


class Run(NamedTuple):
    """Slots next to each other, which most passes write; ``number`` of them from ``first`` on."""

    first: int
    number: int


def write(memory: Tensor, dim: int, slots: Run | Tensor, states: Tensor) -> None:
    """Copy ``states`` into some slots of ``memory`` along ``dim``."""
    if isinstance(slots, Run):
        memory.narrow(dim, *slots).copy_(states)
    else:
        memory.index_copy_(dim, slots.to(memory.device), states)


class Slots:
    """Which image token each cache slot holds, in the order in which they are first fed, after the prefix.

    A fed token attends to the whole prefix, and to every slot whose offset is not above its own: decided tokens
    of rows above, and its own row up to itself. A token that is fed again, when what stood in for it is decided,
    takes the slot that it had: nothing stale is left, and nothing is moved.

    Args:
        cache: empty; its layers are replaced by `SlotLayer`.
        valid: bool ``[rows, tokens]`` of the prefix, False for padding.
        most: image tokens that there will be.
    """

    def __init__(self, cache: Cache, valid: Tensor, most: int) -> None:
        self.valid, self.capacity = valid, valid.shape[1] + most
        prefix = torch.where(valid, -1, _NEVER)
        # One row for all where no prefix is padded.
        self.offsets = F.pad(prefix[:1] if bool(valid.all()) else prefix, (0, most), value=_NEVER)[:, None]
        self.held = valid.shape[1]
        self.written: Run | Tensor = Run(0, self.held)
        self.slot_of: dict[int, int] = {}
        cache.layers = [SlotLayer(self) for _ in cache.layers]
        # A cache without a configuration makes its layers as they come.
        cache.layer_class_to_replicate = partial(SlotLayer, self)

    def prefix_mask(self, dtype: torch.dtype) -> Tensor:
        """Causal within the prefix, without padding: additive ``[rows, 1, tokens, tokens]``."""
        tokens = self.valid.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=self.valid.device).tril()
        # Padding sees itself: a row without any visible key would give NaN in half precision.
        own = torch.eye(tokens, dtype=torch.bool, device=self.valid.device)
        return _additive(~(causal & self.valid[:, None, :] | own), dtype)[:, None]

    def feed(self, offsets: Tensor, listed: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Take slots for the tokens of a pass; returns their additive mask ``[rows or 1, 1, queries, slots]``.

        Args:
            offsets: ``[queries]``. listed: the same.
        """
        first = self.held
        slots = [self.slot_of.setdefault(each, self.valid.shape[1] + len(self.slot_of)) for each in listed]
        self.held = self.valid.shape[1] + len(self.slot_of)
        again = self.held - first < len(slots)
        self.written = torch.tensor(slots, device=offsets.device) if again else Run(first, len(slots))
        write(self.offsets, 2, self.written, offsets.expand(len(self.offsets), 1, -1))
        return _additive(self.offsets.narrow(2, 0, self.held) > offsets.unsqueeze(1), dtype).unsqueeze(1)


class SlotLayer(DynamicLayer):
    """A cache layer in memory that is taken once, written where `Slots` says."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots
        self.memory: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.memory = tuple(
            each.new_empty(*each.shape[:2], self.slots.capacity, each.shape[3]) for each in (key_states, value_states)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.memory
        write(keys, 2, self.slots.written, key_states)
        write(values, 2, self.slots.written, value_states)
        self.keys, self.values = keys.narrow(2, 0, self.slots.held), values.narrow(2, 0, self.slots.held)
        return self.keys, self.values


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Eager attention adds its mask, so a bool one would be right for sdpa only."""
    blank = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return blank.masked_fill_(hidden, torch.finfo(dtype).min)


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
        highest = scores.amax(-1)
        if not math.isfinite(highest.sum().item()):
            self._check(highest, cells)
        return scores

    def _check(self, highest: Tensor, cells: tuple[Cell, ...]) -> None:
        """Raise `ValueError` for a cell whose highest score ``[batch, cells]`` is one that nothing can be drawn by."""
        # Not a number is not above minus infinity either; infinity can be taken but has no probability.
        possible = (highest > -torch.inf) & ((highest < torch.inf) | (not self.do_sample))
        if not bool(possible.all()):
            row, column = cells[int((~possible).any(0).nonzero()[0, 0])]
            raise ValueError(
                f"the logits processors leave no token for row {row}, column {column} of the image: every score is "
                "minus infinity, or one is infinite or not a number; check processors that constrain tokens"
            )

    def probabilities(self, scores: Tensor) -> Tensor:
        """The law of the next token, float32; greedy decoding has all of it on one."""
        if self.do_sample:
            return scores.float().softmax(-1)
        return torch.zeros_like(scores, dtype=torch.float32).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)

    def draw(self, scores: Tensor) -> Tensor:
        """One id for each of ``[..., vocabulary]``."""
        if not self.do_sample:
            return scores.argmax(-1)
        # The race by which `torch.multinomial` draws one id: the same ids from the same state of the generator. Its
        # checks of the law, which `process` has done, and its copies would take as long again.
        law = self.probabilities(scores)
        return (law / torch.empty_like(law).exponential_(generator=self.generator)).argmax(-1)


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


@dataclass(frozen=True)
class Indices:
    """A pass as a decoder uses it, ready for the device.

    Args:
        offsets: ``[queries]``, positions counted from the first token after the prefix; ``listed``: the same.
        sources: ``[queries]``, where in the image the tokens lie that are fed; end-of-row tokens lie there from the
            start.
        keep: the queries whose logits are wanted. targets: ``[cells]``, where what they give belongs.
    """

    offsets: Tensor
    listed: tuple[int, ...]
    sources: Tensor
    keep: list[int]
    targets: Tensor

    @classmethod
    def of(cls, step: Pass, grid: RasterGrid, device: torch.device) -> Indices:
        def ready(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.long, device=device)

        listed = tuple(feed.offset for feed in step.feeds)
        sources = (feed.offset if feed.source is None else grid.offset(*feed.source) for feed in step.feeds)
        keep = [index for index, feed in enumerate(step.feeds) if feed.yields is not None]
        targets = (grid.offset(*cell) for cell in step.yields)
        return cls(ready(listed), listed, ready(sources), keep, ready(targets))


@lru_cache(maxsize=8)
def fixed_steps(
    grid: RasterGrid, window: int, row_start: RowStart, device: torch.device
) -> tuple[tuple[Pass, Indices], ...]:
    """All passes of a fixed window; made once, since every image has the same."""
    with torch.inference_mode(False):
        schedule = ZipARSchedule(grid, window, row_start)
        return tuple((step, Indices.of(step, grid, device)) for step in schedule)


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
        self.cache, self.slots = cache, Slots(cache, prefix.valid, most_fed(frontier.grid))
        self.starts = prefix.starts[:, None]
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
        self.accepted = False

    def run(self) -> Decoded:
        """Decode the whole image."""
        grid = self.frontier.grid
        # Passes are many and short: what autograd keeps of views and versions even without gradients would be a tenth.
        with torch.inference_mode():
            passes, starts = self._run()
        # The image is older than the mode; what is made in it could not be trained on.
        kept = () if self.scores is None else tuple(self.scores[cell].clone() for cell in grid.cells())
        return Decoded(self.image, kept, passes, starts)

    def _run(self) -> tuple[int, list[int]]:
        """All passes; returns their number, and the pass that decided each row's first token."""
        starts = [0] * self.frontier.grid.rows
        passes = 0
        for step, indices in self._steps():
            if self.at_pass is not None:
                self.at_pass(self.image)
            passes += 1
            scores = self._scores(self._forward(step, indices), step)
            self.accepted = self._decide(step, indices, scores)
            for row, column in step.yields:
                if column == 0 and ((row, column) != step.trial or self.accepted):
                    starts[row] = passes
        return passes, starts

    def _steps(self) -> Iterable[tuple[Pass, Indices]]:
        frontier, device = self.frontier, self.image.device
        if not frontier.adaptive:
            return fixed_steps(frontier.grid, frontier.window, frontier.row_start, device)
        passes = iter(lambda: frontier.advance(accepted=self.accepted), None)
        return ((step, Indices.of(step, frontier.grid, device)) for step in passes)

    def _forward(self, step: Pass, indices: Indices) -> Tensor:
        """Logits ``[rows, cells, vocabulary]`` of the cells that the pass yields."""
        prefix = self.prefix
        if not step.feeds:
            mask = self.slots.prefix_mask(prefix.embeddings.dtype)
            last = [prefix.valid.shape[1] - 1]
            return self.adapter.logits(prefix.embeddings, prefix.positions, mask, self.cache, last)
        ids = self.image.index_select(1, indices.sources)
        embeddings = self.adapter.embed_image(ids if self.branches == 1 else ids.repeat(self.branches, 1))
        positions = self.starts + indices.offsets
        mask = self.slots.feed(indices.offsets, indices.listed, embeddings.dtype)
        return self.adapter.logits(embeddings, positions, mask, self.cache, indices.keep)

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

    def _decide(self, step: Pass, indices: Indices, scores: Tensor) -> bool:
        """Draw the pass's cells; returns whether its trial is accepted."""
        ids, accepted = self.sampler.draw(scores), False
        last = step.yields[-1]
        # A row's first token is the lowest of the pass, so it comes last.
        if last == step.trial or (self.trial is not None and last[1] == 0):
            ids[:, -1], accepted = self._try(ids[:, -1], scores[:, -1], final=last != step.trial)
        self.image.index_copy_(1, indices.targets, ids)
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


def most_fed(grid: RasterGrid) -> int:
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

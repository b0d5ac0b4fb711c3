"""What every selection gets and gives: waiting tokens in, important and regular ones out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tersor.kv.memo import remembered
from tersor.kv.selection.probes import ProbeScores


@dataclass
class Chosen:
    """Tokens picked for one group.

    Args:
        index: Ascending places among the waiting tokens, int64 ``[batch, scopes, n]``; ``scopes`` is 1, or the number
            of KV heads where every head picks its own.
        valid: False for the empty slots of samples with fewer than ``n`` tokens, bool like ``index``; None without any.
    """

    index: Tensor
    valid: Tensor | None

    @property
    def slots(self) -> Tensor:
        """True for slots that hold a token, bool like ``index``."""
        return torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid

    def gather(self, tokens: Tensor) -> Tensor:
        """Pick from ``[batch, kv_heads, waiting tokens, dim]`` to ``[batch, kv_heads, n, dim]``."""
        batch, heads, _, dim = tokens.shape
        index = self.index[..., None].expand(batch, heads, -1, dim)
        return tokens.gather(2, index)

    def rows(self) -> list[Tensor]:
        """The tokens of each sample on the CPU, int64 ``[its own number]``, where all heads share one choice."""
        index, valid = self.index[:, 0].cpu(), self.slots[:, 0].cpu()
        return [own[real] for own, real in zip(index, valid, strict=True)]


def choose_among(picked: Tensor, counts: Sequence[int]) -> Chosen:
    """The tokens where ``picked``, bool ``[batch, tokens]``, is True; ``counts`` says how many each sample has."""
    tokens, most = picked.shape[1], max(counts)
    place = torch.arange(tokens, device=picked.device).masked_fill(~picked, tokens)
    index = place.sort(-1).values[:, None, :most]
    if min(counts) == most:
        return Chosen(index.contiguous(), None)
    valid = index < tokens
    return Chosen(index.masked_fill(~valid, 0), valid)


def split(important: Tensor, counts: Sequence[int], valid: Tensor | None) -> tuple[Chosen, Chosen]:
    """The tokens where ``important``, bool ``[batch, tokens]``, is True, and the others.

    Args:
        important: Never True for padding.
        counts: How many of each sample are.
        valid: False for padding, bool ``[batch, tokens]``; None without any.
    """
    if valid is None and min(counts) == max(counts):
        order = important.sort(dim=-1, descending=True, stable=True).indices[:, None]
        return Chosen(order[..., : counts[0]], None), Chosen(order[..., counts[0] :], None)
    others = ~important if valid is None else valid & ~important
    lengths = [important.shape[1]] * len(counts) if valid is None else counts_of(valid)
    left = [length - own for length, own in zip(lengths, counts, strict=True)]
    return choose_among(important, counts), choose_among(others, left)


def counts_of(valid: Tensor) -> list[int]:
    """How many tokens of each sample are no padding; read back once for a mask that all layers share."""
    counts: list[int] = remembered(valid, "counts", None, lambda: valid.sum(-1).tolist())
    return counts


def choose_none(batch: int, device: torch.device) -> Chosen:
    """No token at all."""
    return Chosen(torch.empty(batch, 1, 0, dtype=torch.int64, device=device), None)


def compact(index: Tensor, empty: int) -> Chosen:
    """Picked tokens in ascending order; entries equal to ``empty`` are empty slots and go last."""
    index = index.sort(-1).values
    valid = index < empty
    count = int(valid.sum(-1).max()) if valid.numel() else 0
    index, valid = index[..., :count], valid[..., :count]
    if bool(valid.all()):
        return Chosen(index.contiguous(), None)
    return Chosen(index.masked_fill(~valid, 0), valid.contiguous())


@dataclass
class Waiting:
    """The tokens about to be compressed, as a selection sees them.

    Args:
        keys: ``[batch, kv_heads, tokens, head_dim]``.
        valid: False for padding, bool ``[batch, tokens]``; None without any.
        scores: Attention that the tokens got so far.
        layer: Index of the layer.
        segment: Number of the segment that the tokens become.
        protected: Tokens that must be kept whatever their scores, bool ``[batch, tokens]``, or None.
        tau: Share of the attention to hold, by row, float64 ``[batch]``; None for the selection's own.
        rows: Probe rows that each sample's scores are the sum of, where every row of attention sums to one; None where
            that is not known.
        finite: Whether the scores were numbers, once a selection has looked.
        count_slots: Whether a choice has no more slots than the fullest sample needs, which has to be read back. For
            tokens of which many are not ``valid``; a sample's padding is worth no waiting.
    """

    keys: Tensor
    valid: Tensor | None
    scores: ProbeScores
    layer: int
    segment: int
    protected: Tensor | None = None
    tau: Tensor | None = None
    rows: list[int] | None = None
    finite: bool = True
    count_slots: bool = False

    def lengths(self) -> Tensor:
        """Valid tokens of each sample, int64 ``[batch]``."""
        batch, _, tokens, _ = self.keys.shape
        if self.valid is None:
            return torch.full((batch,), tokens, device=self.keys.device)
        return self.valid.sum(-1)

    def places(self) -> Tensor:
        """Index of each token among the valid tokens of its sample, int64 ``[batch, tokens]``."""
        batch, _, tokens, _ = self.keys.shape
        if self.valid is None:
            return torch.arange(tokens, device=self.keys.device).expand(batch, tokens)
        return self.valid.cumsum(-1) - 1

    def all_important(self) -> tuple[Chosen, Chosen]:
        """The choice of a selection that finds every token important."""
        batch, _, tokens, _ = self.keys.shape
        index = torch.arange(tokens, device=self.keys.device).expand(batch, 1, tokens)
        none = choose_none(batch, self.keys.device)
        if self.valid is None:
            return Chosen(index, None), none
        return self.ascending(index.masked_fill(~self.valid[:, None, :], tokens), tokens), none

    def ascending(self, index: Tensor, slots: int) -> Chosen:
        """Picked tokens in ascending order; entries that are the number of tokens are empty slots and go last.

        Args:
            index: Places among the waiting tokens, int64 ``[batch, scopes, n]``.
            slots: Slots to keep, at least as many as any sample fills.
        """
        tokens = self.keys.shape[2]
        if self.count_slots:
            return compact(index, tokens)
        index = index.sort(-1).values[..., :slots]
        valid = index < tokens
        return Chosen(index.masked_fill(~valid, 0), valid)


class Selection(Protocol):
    """What the engine asks of a selection; a frozen dataclass that holds no tensors."""

    @property
    def per_head(self) -> bool:
        """Whether every KV head picks its own tokens."""

    def probe_rows(self, length: int, *, layer: int, segment: int) -> Tensor:
        """Rows of a ``length``-token update to probe, int64 and ascending; empty to probe none."""

    def probes_step(self, step: int, gap: int, *, layer: int, segment: int) -> bool:
        """Whether the decoding step that fills buffer slot ``step`` of ``gap`` is a probe."""

    def choose(self, waiting: Waiting) -> tuple[Chosen, Chosen]:
        """The important tokens and the regular ones."""

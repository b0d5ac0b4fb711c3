"""Selections of a fixed share of the tokens: by saliency (ZipCache, section 3.4), the newest, or random ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tersor._errors import UnsupportedError
from tersor.kv.selection.base import Chosen, Waiting
from tersor.kv.selection.probes import normalized_saliency, probe_positions, seeded_generator

Normalization = Literal["probe_nnz", "full_nnz", "none"]
Scope = Literal["layer", "kv_head"]
DecodeProbe = Literal["all", "paper", "last"]


@dataclass(frozen=True, kw_only=True)
class RatioSelection:
    """A fixed share of the tokens, ranked by `scores`; the base of the concrete selections.

    Args:
        ratio: Share of important tokens.
        seed: Seed of every random choice.
    """

    ratio: float
    seed: int = 0

    @property
    def per_head(self) -> bool:
        return False

    def probe_rows(self, length: int, *, layer: int, segment: int) -> Tensor:
        return torch.empty(0, dtype=torch.int64)

    def probes_step(self, step: int, gap: int, *, layer: int, segment: int) -> bool:
        return False

    def scores(self, waiting: Waiting) -> Tensor:
        """Rank of the tokens, ``[batch, scopes, tokens]``, larger is more important."""
        raise UnsupportedError(f"{type(self).__name__} does not rank tokens; override `scores`")

    def choose(self, waiting: Waiting) -> tuple[Chosen, Chosen]:
        if self.ratio == 1.0:
            return waiting.all_important()
        tokens, scores = waiting.keys.shape[2], self.scores(waiting)
        if waiting.valid is not None:
            scores = scores.masked_fill(~waiting.valid[:, None, :], -torch.inf)
        # Stable: of equal scores the earlier token counts as more important, whatever the batch neighbours.
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        slots = tokens - int((1.0 - self.ratio) * tokens)
        if waiting.valid is None:
            picked = order[..., :slots].sort(-1).values, order[..., slots:].sort(-1).values
            return Chosen(picked[0], None), Chosen(picked[1], None)
        length = waiting.lengths()
        regular = ((1.0 - self.ratio) * length.double()).to(torch.int64)
        rank = torch.arange(tokens, device=order.device).expand_as(order)
        important = (length - regular)[:, None, None]
        others = (rank < important) | (rank >= length[:, None, None])
        # No sample has more of either kind than one without padding.
        return (
            waiting.ascending(order.masked_fill(rank >= important, tokens), slots),
            waiting.ascending(order.masked_fill(others, tokens), tokens - slots),
        )


@dataclass(frozen=True, kw_only=True)
class SaliencySelection(RatioSelection):
    """The tokens with the largest (normalized) attention from probe rows: ZipCache's metric.

    Args:
        probe_recent_ratio: Share of a prompt's rows that are probed at its end.
        probe_random_ratio: Share of a prompt's rows that are probed at random places before that.
        normalization: ``"probe_nnz"`` divides by the probe rows that see a column (the paper), ``"full_nnz"`` by all
            rows that do (the authors' code), ``"none"`` accumulates (as H2O and MiKV do).
        scope: One decision a ``"layer"``, or one a ``"kv_head"``.
        decode_probe: Decoding steps that score the buffer: ``"all"``, ``"paper"`` (a random share and the last ones)
            or ``"last"``.
        max_probe_tokens: Largest number of probe rows, or None.
    """

    probe_recent_ratio: float = 0.05
    probe_random_ratio: float = 0.05
    normalization: Normalization = "probe_nnz"
    scope: Scope = "layer"
    decode_probe: DecodeProbe = "all"
    max_probe_tokens: int | None = None

    @property
    def per_head(self) -> bool:
        return self.scope == "kv_head"

    def probe_rows(self, length: int, *, layer: int, segment: int) -> Tensor:
        if not 0.0 < self.ratio < 1.0:
            return super().probe_rows(length, layer=layer, segment=segment)  # one group needs no ranking
        recent = length - int((1.0 - self.probe_recent_ratio) * length)
        random = int(self.probe_random_ratio * length)
        if self.max_probe_tokens is not None and recent + random > self.max_probe_tokens:
            share = self.max_probe_tokens / (recent + random)
            recent, random = max(1, int(recent * share)), int(random * share)
        return probe_positions(length, recent, random, seeded_generator(self.seed, layer, segment, length))

    def probes_step(self, step: int, gap: int, *, layer: int, segment: int) -> bool:
        if not 0.0 < self.ratio < 1.0:
            return False
        if self.decode_probe == "all":
            return True
        if self.decode_probe == "last":
            return step >= gap - 1
        recent = max(1, int(self.probe_recent_ratio * gap))
        random = int(self.probe_random_ratio * gap)
        generator = seeded_generator(self.seed, layer, segment, gap)
        return step >= gap or step in probe_positions(gap, recent, random, generator).tolist()

    def scores(self, waiting: Waiting) -> Tensor:
        totals = waiting.scores.totals(waiting.keys.shape[2])
        if totals is None:
            # No attention was seen: keys of small norm draw attention more often than not.
            norms = -waiting.keys.float().norm(dim=-1)
            return norms if self.per_head else norms.mean(1, keepdim=True)
        sums, counts = totals
        if self.normalization == "none":
            return sums
        if self.normalization == "full_nnz":
            counts = waiting.lengths()[:, None] - waiting.places()
        return normalized_saliency(sums, counts)


@dataclass(frozen=True, kw_only=True)
class RecentSelection(RatioSelection):
    """The newest tokens: the sliding-window baseline."""

    def scores(self, waiting: Waiting) -> Tensor:
        return waiting.places()[:, None, :].float()


@dataclass(frozen=True, kw_only=True)
class RandomSelection(RatioSelection):
    """Random tokens, the same for a sample whatever its batch neighbours: the floor of any selection."""

    def scores(self, waiting: Waiting) -> Tensor:
        tokens = waiting.keys.shape[2]
        generator = seeded_generator(self.seed, waiting.layer, waiting.segment)
        draw = torch.rand(tokens, generator=generator).to(waiting.keys.device)
        return draw[waiting.places().clamp_min(0)][:, None, :]

"""Selection by attention mass: the smallest set of tokens that holds a share of the attention (ZipVL, section 2.2).

``a_j`` is the attention that token ``j`` gets from the probe rows, averaged over the query heads, and ``c_j`` the
number of probe rows that can see it. *How many* tokens matter is counted on ``a`` (Eq. 6), *which ones* is decided by
``a_j / c_j`` (Eq. 8, 9), so that early tokens, which more rows see, get no head start.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tersor._errors import TersorError, UnsupportedError
from tersor.kv.selection.base import Chosen, Waiting, split
from tersor.kv.selection.probes import normalized_saliency, probe_positions, seeded_generator

Probe = Literal["sampled", "all"]
SelectBy = Literal["normalized", "raw"]


def smallest_set(sums: Tensor, tau: float | Tensor) -> Tensor:
    """Eq. (6): the least ``p`` such that the ``p`` largest of ``sums`` make up ``tau`` of all of them.

    Rows of attention sum to one, so all of them is the number of probe rows in a prompt, and the mass of the window
    where only a window of a row is looked at.

    Args:
        sums: Attention of each token, at least 0, ``[batch, tokens]``.
        tau: Share to reach, one for all or by sample ``[batch]``.

    Returns:
        ``p`` of each sample, at least 1, int64 ``[batch]``.
    """
    reached = sums.double().sort(-1, descending=True).values.cumsum(-1)
    share = torch.as_tensor(tau, dtype=reached.dtype, device=sums.device).reshape(-1, 1)
    return (reached < share * reached[:, -1:]).sum(-1) + 1


@dataclass(frozen=True, kw_only=True)
class PromptSelection:
    """Tokens of a prompt that take part in attention, from probe rows; the base of the concrete selections.

    Args:
        probe_recent: Rows at the end of the prompt that are probed.
        probe_random: Rows at random places before them that are probed.
        probe: ``"sampled"`` takes these rows, ``"all"`` every row.
        seed: Seed of the random rows.
        protect_recent: Tokens at the end of the prompt that are always added.
        protect_first: Tokens at its start that are always added.
        select_by: Rank by ``"normalized"`` or ``"raw"`` attention.
        check_finite: Raise where scores are not finite, instead of keeping every token.
    """

    probe_recent: int = 64
    probe_random: int = 64
    probe: Probe = "sampled"
    seed: int = 0
    protect_recent: int = 1
    protect_first: int = 0
    select_by: SelectBy = "normalized"
    check_finite: bool = False

    @property
    def per_head(self) -> bool:
        return False

    def keeps_all(self, layer: int) -> bool:
        """Whether no token of ``layer`` is ever left out, so that nothing needs to be probed."""
        return False

    def probe_rows(self, length: int, *, layer: int, segment: int) -> Tensor:
        """A pure function of (seed, layer, length): a forward that is computed again picks the same rows."""
        if self.keeps_all(layer):
            return torch.empty(0, dtype=torch.int64)
        if self.probe == "all":
            return torch.arange(length)
        generator = seeded_generator(self.seed, layer, length)
        return probe_positions(length, self.probe_recent, self.probe_random, generator)

    def probes_step(self, step: int, gap: int, *, layer: int, segment: int) -> bool:
        return step >= gap - 1 and not self.keeps_all(layer)

    def count(self, sums: Tensor, waiting: Waiting) -> Tensor:
        """Number of tokens to take by rank, int64 ``[batch]``; ``sums`` is ``[batch, tokens]``."""
        raise UnsupportedError(f"{type(self).__name__} does not count tokens; override `count`")

    def ranking(self, sums: Tensor, counts: Tensor, waiting: Waiting) -> Tensor:
        """Eq. (8): the attention a token gets from each row that sees it, ``[batch, tokens]``; larger is better."""
        return sums if self.select_by == "raw" else normalized_saliency(sums[:, None], counts)[:, 0]

    def choose(self, waiting: Waiting) -> tuple[Chosen, Chosen]:
        """Eq. (9) and the protected tokens. Without finite scores every token is important.

        How many tokens each sample keeps, and whether the scores are finite, is read back from the device at once.
        """
        batch, _, tokens, _ = waiting.keys.shape
        device = waiting.keys.device
        totals = None if self.keeps_all(waiting.layer) else waiting.scores.totals(tokens)
        if totals is None:
            return waiting.all_important()
        sums, counts = totals[0][:, 0], totals[1]
        rank = self.ranking(sums, counts, waiting).detach()
        if waiting.valid is not None:
            rank = rank.masked_fill(~waiting.valid, -torch.inf)
        # Stable: of equal scores the earlier token counts as more important, whatever the batch neighbours.
        order = rank.sort(dim=-1, descending=True, stable=True).indices
        taken = torch.arange(tokens, device=device) < self.count(sums.detach(), waiting)[:, None]
        important = torch.empty(batch, tokens, dtype=torch.bool, device=device).scatter_(1, order, taken)
        self._protect(important, waiting)
        kept, mass = torch.stack([x.sum(-1, dtype=torch.float64) for x in (important, sums.detach())]).tolist()
        if not self._are_numbers(mass, waiting):
            return waiting.all_important()
        return split(important, [int(count) for count in kept], waiting.valid)

    def _protect(self, important: Tensor, waiting: Waiting) -> None:
        """Add the protected tokens to ``important``, in place, and take padding out."""
        if waiting.valid is None and waiting.protected is None:
            important[:, max(important.shape[1] - self.protect_recent, 0) :] = True
            if waiting.segment == 0 and self.protect_first:
                important[:, : self.protect_first] = True
            return
        important |= self.protected(waiting)
        if waiting.valid is not None:
            important &= waiting.valid

    def protected(self, waiting: Waiting) -> Tensor:
        """Tokens that are added whatever their scores, bool ``[batch, tokens]``."""
        places = waiting.places()
        protected = places >= waiting.lengths()[:, None] - self.protect_recent
        if waiting.segment == 0:
            protected = protected | (places < self.protect_first)
        return protected if waiting.protected is None else protected | waiting.protected

    def _are_numbers(self, mass: Sequence[float], waiting: Waiting) -> bool:
        """Whether all scores are finite, by what each sample's sum up to; a row that holds NaN adds nothing to them."""
        least = [0.0] * len(mass) if waiting.rows is None else [0.99 * rows for rows in waiting.rows]
        waiting.finite = all(low <= own < math.inf for low, own in zip(least, mass, strict=True))
        if waiting.finite:
            return True
        message = (
            f"layer {waiting.layer}: attention scores hold NaN or infinity; look for overflow in the model's precision"
        )
        if self.check_finite:
            raise TersorError(message)
        warnings.warn(f"{message}. The layer keeps every token", stacklevel=2)
        return False


@dataclass(frozen=True, kw_only=True)
class MassSelection(PromptSelection):
    """The smallest set of tokens that holds a share ``tau`` of the attention mass: ZipVL's adaptive ratio."""

    tau: float = 0.975

    def keeps_all(self, layer: int) -> bool:
        return self.tau >= 1.0

    def count(self, sums: Tensor, waiting: Waiting) -> Tensor:
        if waiting.tau is None:
            return smallest_set(sums, self.tau)
        return smallest_set(sums, waiting.tau).masked_fill(waiting.tau >= 1.0, sums.shape[-1])

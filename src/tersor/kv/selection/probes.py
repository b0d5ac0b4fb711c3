"""Token saliency by normalized attention, from a few probe rows (ZipCache, section 3.4).

``A`` is the attention matrix of a layer. The accumulated score of column ``i`` is the sum of ``A[k, i]`` over
rows ``k``; it favours early tokens, whose columns have more rows. The normalized score divides by the number
of rows that can see the column. Only probe rows are ever computed: the most recent ones and a random sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tersor.kv.memo import remembered
from tersor.lowbit.codes import compute_dtype
from tersor.lowbit.kernels import get_kernel

#: Latest decoding steps whose attention is kept apart, so that drafts can be taken back.
KEPT_STEPS = 8


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator whose state is a pure function of ``key``, e.g. (seed, layer, segment, length)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def probe_positions(length: int, recent: int, random: int, generator: torch.Generator) -> Tensor:
    """Ascending rows of a prompt to probe: the ``recent`` last and ``random`` others without replacement.

    At least one recent row is always taken. Returns int64 ``[rows]``.
    """
    recent = min(max(recent, 1), length)
    earlier = length - recent
    picked = torch.randperm(earlier, generator=generator)[: min(random, earlier)]
    return torch.cat([picked.sort().values, torch.arange(earlier, length)])


@dataclass(frozen=True)
class Queries:
    """Query vectors whose rows of attention are looked at.

    Args:
        query: ``[batch, heads, rows, dim]``.
        scaling: Factor of the scores.
        softcap: Limit of the scores where the model has one, or None.
        lse: Log-sum-exp of each whole row, ``[batch, heads, rows]``; without it, the softmax runs over the given keys.
    """

    query: Tensor
    scaling: float
    softcap: float | None = None
    lse: Tensor | None = None

    def of(self, samples: slice, tokens: slice | Tensor) -> Queries:
        """Some tokens of some samples."""
        lse = None if self.lse is None else self.lse[samples][..., tokens]
        return Queries(_take(self.query[samples], tokens), self.scaling, self.softcap, lse)

    def sums(self, keys: Tensor, rows: Tensor, allowed: Tensor | None) -> Tensor:
        """Attention that some rows give to ``keys``, ``[batch, kv_heads, columns]``; see `reference.probe_sums`."""
        kernel = get_kernel("probe_sums", device=keys.device.type)
        sums: Tensor = kernel(
            self.query, keys, rows, scaling=self.scaling, softcap=self.softcap, lse=self.lse, allowed=allowed
        )
        return sums


def rows_to_probe(selection: Any, length: int, layer: int, segment: int, device: torch.device) -> Tensor:
    """`Selection.probe_rows` on a device, drawn and brought there once."""
    return _drawn(selection, length, layer, segment, device)


@lru_cache(maxsize=128)  # as many layers as the deepest models have
@torch.inference_mode(False)
def _drawn(selection: Any, length: int, layer: int, segment: int, device: torch.device) -> Tensor:
    rows: Tensor = selection.probe_rows(length, layer=layer, segment=segment)
    return rows.to(device)


def own_places(valid: Tensor) -> list[slice | Tensor]:
    """Where the tokens of each sample are, in one run where they are padded on one side; read back once.

    Args:
        valid: False for padding, bool ``[batch, tokens]``.
    """

    def read() -> list[slice | Tensor]:
        count = valid.sum(-1)
        first = valid.to(torch.uint8).argmax(-1)
        last = valid.shape[1] - 1 - valid.flip(-1).to(torch.uint8).argmax(-1)
        runs = torch.stack([first, last + 1, count]).T.tolist()
        return [
            slice(start, start + tokens) if tokens in (0, stop - start) else own.nonzero()[:, 0]
            for own, (start, stop, tokens) in zip(valid, runs, strict=True)
        ]

    return remembered(valid, "own places", None, read)


def probe_scores(
    queries: Queries,
    keys: Tensor,
    valid: Tensor | None,
    window: Tensor | None,
    pick_rows: Callable[[int], Tensor],
    *,
    per_head: bool,
) -> tuple[Tensor, Tensor] | None:
    """Attention that the probe rows of an update give to every token.

    Each ragged sample is cut to its own tokens first: it then runs through the same shapes, and so gets the
    same bits, as it would alone.

    Args:
        queries: The newest tokens, all rows of the update.
        keys: ``[batch, kv_heads, columns, dim]``.
        valid: The tokens that count, bool ``[batch, columns]``; None where all do.
        window: Where a query may look, bool ``[batch, new, columns]``; None for plain causal attention.
        pick_rows: From the number of a sample's own new tokens to those to probe, on the device of the keys.
        per_head: Whether KV heads are scored apart; their mean otherwise.

    Returns:
        Sums ``[batch, scopes, columns]`` and the rows that can see each column ``[batch, columns]``; None where
        nothing was probed.
    """
    batch, _, columns, _ = keys.shape
    earlier = columns - queries.query.shape[2]
    if valid is None:
        return _scores_of(queries, keys, window, pick_rows(columns - earlier), per_head)
    sums = counts = None
    for row, own in enumerate(own_places(valid)):
        sample, new = slice(row, row + 1), _behind(own, earlier)
        asked, own_keys = queries.of(sample, new), _take(keys[sample], own)
        # Among a sample's own tokens plain causal attention is plain again.
        seen = None if window is None else _take(window[sample], new)[..., own]
        scores = _scores_of(asked, own_keys, seen, pick_rows(asked.query.shape[2]), per_head)
        if scores is None:
            continue
        if sums is None or counts is None:
            sums = scores[0].new_zeros(batch, scores[0].shape[1], columns)
            counts = sums.new_zeros(batch, columns)
        sums[sample, :, own], counts[sample, own] = scores
    return None if sums is None or counts is None else (sums, counts)


def _scores_of(
    queries: Queries, keys: Tensor, window: Tensor | None, rows: Tensor, per_head: bool
) -> tuple[Tensor, Tensor] | None:
    """`probe_scores` of samples without padding."""
    if len(rows) == 0:
        return None
    allowed = None if window is None else window[:, rows]
    sums = queries.sums(keys, rows, allowed)
    if allowed is None:
        last = rows + (keys.shape[2] - queries.query.shape[2])  # the last column that each row sees
        place = torch.arange(keys.shape[2], device=keys.device)
        counts = (len(rows) - torch.searchsorted(last, place)).to(sums.dtype)[None]
    else:
        counts = allowed.sum(1).to(sums.dtype)
    return sums if per_head else sums.mean(1, keepdim=True), counts.expand(len(keys), -1)


def _behind(own: slice | Tensor, earlier: int) -> slice | Tensor:
    """Those of some columns that are behind the first ``earlier`` ones, counted from there."""
    if isinstance(own, slice):
        return slice(max(own.start - earlier, 0), max(own.stop - earlier, 0))
    return own[own >= earlier] - earlier


def _take(x: Tensor, tokens: slice | Tensor) -> Tensor:
    """Some tokens of ``[..., tokens, dim]``."""
    return x[..., tokens, :]


@dataclass
class ProbeScores:
    """Attention that the tokens waiting for compression have received so far.

    Single decoding steps are summed up, and the latest ones also kept apart: a rejected draft token takes its own along
    when the cache is cropped, so nothing of it remains. A crop of more tokens than that leaves what they gave.

    Args:
        sums: Attention from long updates, ``[batch, scopes, columns]``; None without any.
        counts: Their probe rows that see a column, ``[batch, columns]``.
        steps: What single steps gave, ``[batch, 1 + kept, scopes + 1, slots]`` as `window_scores` writes it; None
            before the first.
        kept: By row of ``steps`` behind the first, the place of its token among those that wait, or -1.
        turn: Row (but the first) that is written next.
    """

    sums: Tensor | None = None
    counts: Tensor | None = None
    steps: Tensor | None = None
    kept: list[int] = field(default_factory=list)
    turn: int = 0

    def add_sums(self, sums: Tensor, counts: Tensor) -> None:
        """Fold in the column sums of a long update; earlier columns are a prefix of the new ones."""
        if self.sums is not None and self.counts is not None:
            sums = sums + _widen(self.sums, sums.shape[-1])
            counts = counts + _widen(self.counts, counts.shape[-1])
        self.sums, self.counts = sums, counts

    def room(self, like: Tensor, scopes: int, slots: int, new: int) -> Tensor:
        """``steps`` for a window of so many slots, in which ``new`` more steps can be kept apart."""
        if self.steps is None:
            self.steps = like.new_zeros(len(like), 1, scopes + 1, slots, dtype=compute_dtype(like.dtype))
        rows = max(KEPT_STEPS, new) - len(self.kept)
        if slots != self.steps.shape[-1] or rows > 0:
            wider = slots - self.steps.shape[-1]
            self.steps = torch.nn.functional.pad(self.steps, (0, wider, 0, 0, 0, max(rows, 0)))
        if rows > 0:
            self.turn = len(self.kept)
            self.kept = [*self.kept, *[-1] * rows]
        return self.steps

    def claim(self, place: int) -> tuple[int, int]:
        """The row of ``steps`` for the step of the token at ``place``, and 1 where it holds an older one, else 0."""
        row, fold = 1 + self.turn, int(self.kept[self.turn] >= 0)
        self.kept[self.turn] = place
        self.turn = (self.turn + 1) % len(self.kept)
        return row, fold

    def totals(self, columns: int) -> tuple[Tensor, Tensor] | None:
        """Accumulated attention ``[batch, scopes, columns]`` and probe rows ``[batch, columns]``, None without any."""
        if self.steps is None:
            if self.sums is None or self.counts is None:
                return None
            return _widen(self.sums[..., :columns], columns), _widen(self.counts[..., :columns], columns)
        steps = _widen(self.steps[..., :columns].sum(1), columns)
        sums, counts = steps[:, :-1], steps[:, -1]
        if self.sums is not None and self.counts is not None:
            sums = sums + _widen(self.sums[..., :columns], columns)
            counts = counts + _widen(self.counts[..., :columns], columns)
        return sums, counts

    def keep_columns(self, start: int, stop: int) -> None:
        """Go on with the waiting tokens ``start:stop``; a step goes with its own token."""
        if self.sums is not None and self.counts is not None:
            gone = self.sums.shape[-1] <= start or stop <= start
            self.sums = None if gone else self.sums[..., start:stop].clone()
            self.counts = None if gone else self.counts[..., start:stop].clone()
        if self.steps is None:
            return
        for row, place in enumerate(self.kept):
            if place >= stop:
                self.steps[:, 1 + row] = 0.0
                self.turn = (self.turn - 1) % len(self.kept)
        self.kept = [place - start if start <= place < stop else -1 for place in self.kept]
        if stop <= start:
            self.steps.zero_()
        else:
            self.steps = _widen(self.steps[..., start:stop], self.steps.shape[-1])


def _widen(x: Tensor, columns: int) -> Tensor:
    return x if x.shape[-1] == columns else torch.nn.functional.pad(x, (0, columns - x.shape[-1]))


def normalized_saliency(sums: Tensor, counts: Tensor) -> Tensor:
    """``p~_i``: accumulated attention over the number of probe rows that can see the column (paper, eq. of 3.4)."""
    return sums / counts.clamp_min(1)[:, None, :]

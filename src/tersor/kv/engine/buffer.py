"""The tokens of one layer that wait for compression, and what is known about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tersor.kv.engine.call import AttentionCall, causal_rows
from tersor.kv.selection.base import Chosen, Selection, Waiting, compact
from tersor.kv.selection.probes import ProbeScores, attention_rows, probe_scores


@dataclass
class Buffer:
    """Raw tokens in order, with their padding and scores.

    Args:
        layer: Index of the layer, for the selection's random draws.
        keys: ``[batch, kv_heads, waiting, key_dim]`` in model precision; None before the first token.
        values: ``[batch, kv_heads, waiting, value_dim]`` likewise.
        valid: False for padding, bool ``[batch, waiting]``; None without any.
        scores: Attention that the tokens got so far.
        decided: Important and regular tokens as a sparse prefill chose them, or None.
    """

    layer: int
    keys: Any = None
    values: Any = None
    valid: Tensor | None = None
    scores: ProbeScores = field(default_factory=ProbeScores)
    decided: tuple[Chosen, Chosen] | None = None

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take new tokens ``[batch, kv_heads, new, head_dim]``, without gradient."""
        self.keys = torch.cat([self.keys, keys.detach()], dim=2)
        self.values = torch.cat([self.values, values.detach()], dim=2)

    def keep(self, start: int, stop: int) -> None:
        """Keep tokens ``start:stop`` in storage of their own, with their scores."""
        self.keys, self.values = self.keys[:, :, start:stop].clone(), self.values[:, :, start:stop].clone()
        self.scores = self.scores.keep_columns(start, stop)
        self.decided = None
        if self.valid is not None:
            self.valid = self.valid[:, start:stop].clone()
            if bool(self.valid.all()):
                self.valid = None

    def decide(self, chosen: tuple[Chosen, Chosen], sums: Tensor, counts: Tensor) -> None:
        """Note what becomes of the newest tokens, those of ``sums``; see `CompressedLayer.decide`."""
        earlier = len(self) - sums.shape[-1]
        if earlier:
            sums, counts = (nn.functional.pad(x, (earlier, 0)) for x in (sums, counts))
            kept, others = chosen
            place, empty = torch.arange(earlier, device=kept.index.device), len(self)
            before = place.expand(len(kept.index), 1, earlier)
            if self.valid is not None:
                before = before.masked_fill(~self.valid[:, None, :earlier], empty)
            newest = (kept.index + earlier).masked_fill(~kept.slots, empty)
            chosen = compact(torch.cat([before, newest], -1), empty), Chosen(others.index + earlier, others.valid)
        self.scores.add_sums(sums, counts)
        self.decided = chosen

    def oldest(self, tokens: int, segment: int) -> Waiting:
        """The ``tokens`` oldest, as the selection sees what becomes number ``segment``."""
        valid = None if self.valid is None else self.valid[:, :tokens]
        return Waiting(self.keys[:, :, :tokens], valid, self.scores.keep_columns(0, tokens), self.layer, segment)

    def window(self, call: AttentionCall) -> Tensor | None:
        """Where the queries of a call may look among the waiting tokens; see `AttentionCall.open`."""
        return None if call.open is None else call.open[..., call.open.shape[-1] - len(self) :]

    def mask(self, call: AttentionCall) -> Tensor | None:
        """The same for the attention kernel, which needs padding and causality in it."""
        queries, window = call.query.shape[2], self.window(call)
        if window is not None:
            return window
        if queries > 1:
            return causal_rows(queries, len(self), self.keys.device)[None]
        return None if self.valid is None else self.valid[:, None, None]

    def note_padding(self, call: AttentionCall) -> None:
        """A new token that no query may look at is padding."""
        new = call.query.shape[2]
        if call.open is None:
            real = None if self.valid is None else self.valid.new_ones(self.keys.shape[0], new)
        else:
            real = call.open[..., call.open.shape[-1] - new :].any(1).any(1)
            if self.valid is None and bool(real.all()):
                real = None
        if real is None:
            return
        if self.valid is None:
            self.valid = real.new_ones(real.shape[0], len(self) - new)
        self.valid = torch.cat([self.valid, real], dim=1)

    @torch.no_grad()
    def score_update(self, call: AttentionCall, selection: Selection, lse: Tensor | None, segment: int) -> None:
        """Add the attention of the probe rows of a prompt or another long update."""
        window = self.window(call)
        scores = probe_scores(
            call.queries(lse),
            self.keys,
            self.valid,
            None if window is None else window.any(1),
            lambda length: selection.probe_rows(length, layer=self.layer, segment=segment),
            per_head=selection.per_head,
        )
        if scores is not None:
            self.scores.add_sums(*scores)

    @torch.no_grad()
    def score_steps(
        self, call: AttentionCall, selection: Selection, lse: Tensor | None, segment: int, gap: int
    ) -> None:
        """Add rows of single decoding steps (or a few draft tokens), restricted to the buffer."""
        new = call.query.shape[2]
        first = len(self) - new
        steps = [
            step for step in range(new) if selection.probes_step(first + step, gap, layer=self.layer, segment=segment)
        ]
        if not steps:
            return
        window = self.window(call)
        allowed = causal_rows(new, len(self), call.query.device) if window is None else window.any(1)
        rows = attention_rows(call.queries(lse).pick(steps), self.keys, allowed[:, steps])
        if not selection.per_head:
            rows = rows.mean(1, keepdim=True)
        self.scores.rows += [rows[:, :, i, : first + step + 1].clone() for i, step in enumerate(steps)]
        # A crop reaches back by a few drafts; rows that are older than a segment only have to be summed.
        self.scores.fold(len(self) - gap)

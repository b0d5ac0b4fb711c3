"""The tokens of one layer that wait for compression, and what is known about them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tersor.kv.engine.call import AttentionCall, causal_rows
from tersor.kv.memo import remembered
from tersor.kv.selection.base import Chosen, Selection, Waiting, compact
from tersor.kv.selection.probes import ProbeScores, probe_scores, rows_to_probe
from tersor.lowbit.kernels import get_kernel
from tersor.lowbit.kernels.packed_attention import Window
from tersor.lowbit.kernels.probe_sums.reference import attention_rows
from tersor.lowbit.kernels.window_scores.reference import write_step

#: Slots by which a buffer grows that holds more tokens than a window: so many, or a share of what it holds.
GROWTH, GROWTH_SHARE = 8, 32


@dataclass
class Buffer:
    """Raw tokens in order, written in place into slots that are allocated for a whole window, with their scores.

    Args:
        layer: Index of the layer, for the selection's random draws.
        slots: Keys ``[batch, kv_heads, slots, key_dim]`` in model precision, of which the first ``tokens`` are in use,
            and values likewise; None before the first token.
        tokens: Tokens that wait.
        valid: False for padding, bool ``[batch, slots]``; None without any.
        scores: Attention that the tokens got so far.
        decided: Important and regular tokens as a sparse prefill chose them, or None.
    """

    layer: int
    slots: tuple[Tensor, Tensor] | None = None
    tokens: int = 0
    valid: Tensor | None = None
    scores: ProbeScores = field(default_factory=ProbeScores)
    decided: tuple[Chosen, Chosen] | None = None

    def __len__(self) -> int:
        return self.tokens

    @property
    def keys(self) -> Any:
        """Keys of the waiting tokens, ``[batch, kv_heads, tokens, key_dim]``; None before the first one."""
        return None if self.slots is None else self.slots[0].narrow(2, 0, self.tokens)

    @property
    def values(self) -> Any:
        """Values likewise."""
        return None if self.slots is None else self.slots[1].narrow(2, 0, self.tokens)

    @property
    def window(self) -> Window | None:
        """The tokens as the attention kernel reads them; None where none waits."""
        return Window(*self.slots, self.tokens, self.valid) if self.slots is not None and self.tokens else None

    @property
    def real(self) -> Tensor | None:
        """The tokens that are no padding, bool ``[batch, tokens]``; None where all are."""
        return None if self.valid is None else self.valid.narrow(1, 0, self.tokens)

    @property
    def is_inference(self) -> bool:
        """Whether the slots were made in torch's inference mode."""
        return self.slots is not None and self.slots[0].is_inference()

    @property
    def held(self) -> int:
        """Slots that are allocated."""
        return 0 if self.slots is None else self.slots[0].shape[2]

    def trimmed(self) -> Buffer:
        """The same tokens without free slots."""
        return replace(self, slots=None if self.slots is None else (self.keys, self.values), valid=self.real)

    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor, window: int) -> None:
        """Take new tokens ``[batch, kv_heads, new, head_dim]``; ``window`` slots are made where there are none."""
        new, held = keys.shape[2], self.held
        needed = self.tokens + new
        if self.slots is None:
            self.slots = _slots(keys, max(needed, window)), _slots(values, max(needed, window))
        elif needed > held:
            growth = max(GROWTH, needed // GROWTH_SHARE) if held else 0
            self.resize(window if needed <= window else needed + growth)
        for slots, tokens in zip(self.slots, (keys, values), strict=True):
            slots.narrow(2, self.tokens, new).copy_(tokens)
        self.tokens += new

    def resize(self, slots: int) -> None:
        """Move to so many slots, at least as many as tokens wait."""
        assert self.slots is not None
        larger = tuple(_slots(x, slots) for x in self.slots)
        if self.tokens:
            for old, new in zip(self.slots, larger, strict=True):
                new[:, :, : self.tokens] = old[:, :, : self.tokens]
        self.slots = larger[0], larger[1]
        if self.valid is not None:
            valid = self.valid.new_ones(len(self.valid), slots)
            valid[:, : self.tokens] = self.valid[:, : self.tokens]
            self.valid = valid

    @torch.no_grad()
    def keep(self, start: int, stop: int, window: int) -> None:
        """Keep tokens ``start:stop`` with their scores; more than ``window`` slots are given back."""
        assert self.slots is not None
        left, held = max(stop - start, 0), self.held
        if start and held > window:
            rest = [x[:, :, start:stop].clone() if left else _slots(x, 0) for x in self.slots]
            self.slots = rest[0], rest[1]
        elif start and left:
            for slots in self.slots:
                slots[:, :, :left] = slots[:, :, start:stop].clone()
        if self.valid is not None:
            rest_valid = self.valid[:, start:stop].clone()
            self.valid = None
            if left:
                self.valid = rest_valid.new_ones(len(rest_valid), self.slots[0].shape[2])
                self.valid[:, :left] = rest_valid
        self.tokens, self.decided = left, None
        if left or self.slots[0].shape[2]:
            self.scores.keep_columns(start, stop)
        else:
            self.scores = ProbeScores()

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
        return Waiting(self.keys[:, :, :tokens], valid, self.scores, self.layer, segment)

    def seen(self, call: AttentionCall) -> Tensor | None:
        """Where the queries of a call may look among the waiting tokens; see `AttentionCall.open`."""
        return None if call.open is None else call.open[..., call.open.shape[-1] - len(self) :]

    def note_padding(self, call: AttentionCall) -> None:
        """A new token that no query may look at is padding."""
        new = call.query.shape[2]
        if call.open is None and self.valid is None:
            return
        assert self.slots is not None
        if self.valid is None:
            batch, _, slots, _ = self.slots[0].shape
            self.valid = torch.ones(batch, slots, dtype=torch.bool, device=call.key.device)
        newest = self.valid.narrow(1, self.tokens - new, new)
        if call.open is None:
            newest.fill_(True)
        else:
            newest.copy_(_newest_seen(call.open, new))

    @torch.no_grad()
    def score_update(self, call: AttentionCall, selection: Selection, lse: Tensor | None, segment: int) -> None:
        """Add the attention of the probe rows of a prompt or another long update."""
        seen = self.seen(call)
        scores = probe_scores(
            call.queries(lse),
            self.keys,
            self.real,
            None if seen is None else seen.any(1),
            lambda length: rows_to_probe(selection, length, self.layer, segment, self.keys.device),
            per_head=selection.per_head,
        )
        if scores is not None:
            self.scores.add_sums(*scores)

    @torch.no_grad()
    def score_steps(
        self, call: AttentionCall, selection: Selection, lse: Tensor | None, segment: int, gap: int
    ) -> None:
        """Add rows of single decoding steps (or a few draft tokens), restricted to the buffer."""
        assert self.slots is not None
        keys, new = self.slots[0], call.query.shape[2]
        first = len(self) - new
        picked = [
            step for step in range(new) if selection.probes_step(first + step, gap, layer=self.layer, segment=segment)
        ]
        if not picked:
            return
        steps = self.scores.room(keys, keys.shape[1] if selection.per_head else 1, keys.shape[2], len(picked))
        places = [(step, *self.scores.claim(first + step)) for step in picked]
        if lse is None or call.options.get("softcap") is not None:
            self._write_rows(call, lse, steps, places)
            return
        kernel = get_kernel("window_scores", device=keys.device.type)
        mask = _of_all_heads(call.open)
        kernel(call.query, keys, lse, steps, places, tokens=len(self), scaling=call.scaling, mask=mask)

    def _write_rows(
        self, call: AttentionCall, lse: Tensor | None, steps: Tensor, places: list[tuple[int, int, int]]
    ) -> None:
        """What the kernel does, for rows that are normalized within the buffer, or capped."""
        new, seen = call.query.shape[2], self.seen(call)
        allowed = causal_rows(new, len(self), call.query.device) if seen is None else seen.any(1)
        capped = call.options.get("softcap")
        rows = attention_rows(call.query, self.keys, allowed, scaling=call.scaling, softcap=capped, lse=lse)
        for step, row, fold in places:
            write_step(steps, row, fold, rows[:, :, step, : len(self) - new + step + 1])


def _slots(like: Tensor, count: int) -> Tensor:
    """So many slots for tokens like these."""
    return like.new_empty(*like.shape[:2], count, like.shape[3])


def _of_all_heads(opened: Tensor | None) -> Tensor | None:
    return None if opened is None else opened if opened.shape[1] == 1 else opened.any(1, keepdim=True)


def _newest_seen(opened: Tensor, new: int) -> Tensor:
    """Which of the ``new`` last columns any query may look at."""
    return remembered(opened, "newest seen", new, lambda: opened[..., opened.shape[-1] - new :].any(1).any(1))

"""Sparse prefill: a prompt attends only among the tokens that a selection picks in this layer (ZipVL, section 2.2).

The residual stream keeps every row. Queries, keys and values of the chosen tokens are gathered in their order, so that
a causal mask over the small problem is the original one restricted to them; all other rows of the output are zero, and
those tokens pass the layer by their residual connection and MLP alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tersor._errors import TersorError
from tersor.kv.engine.call import AttentionCall, boolean_mask, causal_rows
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.engine.state import ForwardState, LayerRecord
from tersor.kv.memo import remembered
from tersor.kv.selection.base import Chosen, Selection, Waiting, choose_among, counts_of
from tersor.kv.selection.probes import ProbeScores, probe_scores, rows_to_probe

QueryMode = Literal["drop", "compute"]


@dataclass(frozen=True, kw_only=True)
class SparsePrefill:
    """Attention of a prompt among the tokens of ``selection``; what follows the prompt is dense over what is stored.

    A later part of a conversation that is as long as a prompt is chosen from by itself: a picture in the second turn
    is read as one in the first, and attends to all that is stored before it. A layer whose method has the same
    ``selection`` stores exactly the tokens that took part.

    Args:
        selection: Which tokens take part.
        query_mode: ``"drop"`` leaves the output of other tokens at zero (the paper), ``"compute"`` restricts keys only.
        min_tokens: Rows with a shorter prompt keep every token.
        protect_text: Only visual tokens may be left out.

    Raises:
        ValueError: If the selection lets every head pick its own tokens.
    """

    selection: Selection
    query_mode: QueryMode = "drop"
    min_tokens: int = 256
    protect_text: bool = False

    sparse = True

    def __post_init__(self) -> None:
        if self.selection.per_head:
            raise TersorError(
                "a sparse prefill gathers one set of tokens for all heads, but this selection lets every head pick its "
                "own; use one choice a layer"
            )

    @property
    def by_threshold(self) -> bool:
        return getattr(self.selection, "tau", 1.0) < 1.0

    def takes_part(self, tokens: int) -> bool:
        return tokens >= max(self.min_tokens, 2)

    def operations(self, share: Tensor) -> Tensor:
        """Without the others' queries the paper's square (section 2.8), otherwise the share itself."""
        return share**2 if self.query_mode == "drop" else share

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Choose, note the choice, attend; see `Prefill.attend`. The choice itself has no gradient."""
        layer: CompressedLayer | None = call.layer
        state: ForwardState | None = call.state
        tokens = call.query.shape[2]
        past = (call.key.shape[2] if layer is None else layer.seen) - tokens
        if past:
            return call.dense() if layer is None or state is None else self._attend_part(call.over_stored(), past)
        completion = None if state is None or state.completion is None else state.completion.to(call.query.device)
        real = real_tokens(call)
        with torch.no_grad():
            kept, skipped = self.choose(call, prompt_tokens(real, completion))
        if skipped is not None:
            return call.dense()
        attending = kept if completion is None else _with_completion(kept, completion, real)
        output = attend_among(call, attending) if self.query_mode == "drop" else attend_to(call, attending)
        if state is not None and completion is not None and not state.choices.storage.evicts and bool(completion.any()):
            output = _completion_dense(output, completion, call)
        return output, None

    def _attend_part(self, call: AttentionCall, past: int) -> tuple[Tensor, Tensor | None]:
        """A later part, whose tokens are the columns of ``call`` behind the first ``past``."""
        mask = None if call.mask is None else call.mask[..., past:]
        own = replace(call, key=call.key[:, :, past:], value=call.value[:, :, past:], mask=mask)
        with torch.no_grad():
            kept, skipped = self.choose(own, real_tokens(own))
        if skipped is not None:
            return call.dense()
        return (attend_among if self.query_mode == "drop" else attend_to)(call, kept, past), None

    def choose(self, call: AttentionCall, prompt: Tensor | None) -> tuple[Chosen, str | None]:
        """The tokens that take part, and why they are all there are or None; tells the layer and the state.

        Args:
            call: The attention over a whole prompt.
            prompt: Tokens of the prompt, bool ``[batch, tokens]``; None where all are.
        """
        layer: CompressedLayer | None = call.layer
        state: ForwardState | None = call.state
        key = call.key
        rows = None if state is None else state.thresholds
        tau = None if rows is None else rows.tau.to(key.device)
        lengths = [key.shape[2]] * len(key) if prompt is None else counts_of(prompt)
        waiting = Waiting(key, prompt, ProbeScores(), layer_index(call), 0, self._protected(call, prompt), tau)
        with torch.set_grad_enabled(rows is not None and rows.differentiable):
            scores = None if max(lengths) < self.min_tokens else self._probe(call, waiting)
        if scores is None:
            kept, _ = waiting.all_important()
            skipped: str | None = "short" if max(lengths) < self.min_tokens else "nothing to leave out"
        else:
            sums, counts = scores
            waiting.scores = ProbeScores(sums, counts)
            waiting.rows = [len(self._rows(call, waiting, length)) for length in lengths]
            kept, others = self.selection.choose(waiting)
            if layer is not None and layer.choices.selection == self.selection:
                layer.decide((kept, others), sums.detach(), counts)
            skipped = None
            if others.index.shape[-1] == 0:
                skipped = "nothing to leave out" if waiting.finite else "scores not finite"
        if state is not None:
            scored = None if scores is None else replace(waiting, keys=key.new_empty(len(key), 1, key.shape[2], 0))
            whole = state.everything(key) if prompt is None else prompt
            state.records[waiting.layer] = LayerRecord(kept, whole, skipped, scored)
        return kept, skipped

    def _rows(self, call: AttentionCall, waiting: Waiting, length: int) -> Tensor:
        """The probe rows of a prompt of so many tokens."""
        return rows_to_probe(self.selection, length, waiting.layer, 0, call.key.device)

    def _probe(self, call: AttentionCall, waiting: Waiting) -> tuple[Tensor, Tensor] | None:
        """What `probe_scores` returns."""
        window = None if call.mask is None else boolean_mask(call.mask[:, 0])
        pick = partial(self._rows, call, waiting)
        return probe_scores(call.queries(), call.key, waiting.valid, window, pick, per_head=False)

    def _protected(self, call: AttentionCall, prompt: Tensor | None) -> Tensor | None:
        """Tokens that must stay: those of short rows, and text where the user says so."""
        state: ForwardState | None = call.state
        protected = None
        if prompt is not None and self.min_tokens > 0:
            protected = (prompt.sum(-1, keepdim=True) < self.min_tokens).expand_as(prompt)
        if self.protect_text and state is not None and state.visual is not None:
            text = ~state.visual.to(call.key.device)
            protected = text if protected is None else protected | text
        return protected


def layer_index(call: AttentionCall) -> int:
    """The model's layer that makes the call."""
    layer: Any = call.module if call.layer is None else call.layer
    return layer.layer_idx


def real_tokens(call: AttentionCall) -> Tensor | None:
    """Tokens that are no padding, bool ``[batch, tokens]``: those that look at themselves; None where all do."""
    if call.mask is None:
        return None
    mask = call.mask

    def read() -> Tensor | None:
        real = boolean_mask(mask[:, 0].diagonal(dim1=-2, dim2=-1))
        return None if bool(real.all()) else real

    return remembered(mask, "real tokens", None, read)


def prompt_tokens(real: Tensor | None, completion: Tensor | None) -> Tensor | None:
    """Tokens of the prompt, None where every token is one."""
    if completion is None or not remembered(completion, "any", None, lambda: bool(completion.any())):
        return real
    return ~completion if real is None else real & ~completion


def attend_among(call: AttentionCall, chosen: Chosen, past: int = 0) -> Tensor:
    """``O[T] = Attn(Q[T], K[T], V[T])`` under the mask restricted to ``T x T``, and ``O[U] = 0``.

    Args:
        call: The attention of the whole prompt.
        chosen: The tokens ``T`` of each row.
        past: Columns in front of the prompt's that every token of ``T`` may look at, too.

    Returns:
        Output ``[batch, tokens, heads, value_dim]``, as the library's functions return it.
    """
    batch, heads, tokens, _ = call.query.shape
    # One row more, behind the last, swallows what empty slots give.
    output = call.query.new_zeros(batch, tokens + 1, heads, call.value.shape[-1])
    if chosen.index.shape[-1] == 0:
        return output[:, :tokens]
    columns = _behind(chosen, past)
    query, key, value = _take(call.query, chosen), _take(call.key, columns), _take(call.value, columns)
    small, _ = replace(call, query=query, key=key, value=value, mask=_restricted(call.mask, chosen, past)).dense()
    place = chosen.index[:, 0] if chosen.valid is None else chosen.index[:, 0].masked_fill(~chosen.valid[:, 0], tokens)
    for row in range(batch):
        output[row, place[row]] = small[row]
    return output[:, :tokens]


def attend_to(call: AttentionCall, chosen: Chosen, past: int = 0) -> Tensor:
    """``O = Attn(Q, K[T], V[T])``: every query, restricted keys; see `attend_among`.

    A query that sees none of them gets zero.
    """
    batch, heads, tokens, _ = call.query.shape
    chosen = _behind(chosen, past)
    if chosen.index.shape[-1] == 0:
        return call.query.new_zeros(batch, tokens, heads, call.value.shape[-1])
    index = chosen.index[:, 0]
    if call.mask is None:
        allowed = index[:, None, None, :] <= torch.arange(past, past + tokens, device=index.device)[:, None]
    else:
        allowed = boolean_mask(torch.stack([own[..., picked] for own, picked in zip(call.mask, index, strict=True)]))
    if chosen.valid is not None:
        allowed = allowed & chosen.valid[:, :, None, :]
    sees = allowed.any(-1, keepdim=True)
    key, value = _take(call.key, chosen), _take(call.value, chosen)
    output, _ = replace(call, key=key, value=value, mask=allowed | ~sees).dense()
    return torch.where(sees.transpose(1, 2), output, 0.0)


def _completion_dense(output: Tensor, completion: Tensor, call: AttentionCall) -> Tensor:
    """``output`` with the rows of the completion replaced: where nothing is evicted, they see the whole prompt."""
    tokens = call.query.shape[2]
    start = int(completion.any(0).nonzero()[0])
    rows = causal_rows(tokens - start, tokens, output.device)[None] if call.mask is None else call.mask[:, :, start:]
    late, _ = replace(call, query=call.query[:, :, start:], mask=rows).dense()
    late = torch.where(completion[:, start:, None, None], late, output[:, start:])
    return torch.cat([output[:, :start], late], dim=1)


def _behind(chosen: Chosen, past: int) -> Chosen:
    """The columns of the chosen tokens and of all ``past`` ones in front of them."""
    if past == 0:
        return chosen
    before = torch.arange(past, device=chosen.index.device).expand(*chosen.index.shape[:2], past)
    valid = None if chosen.valid is None else nn.functional.pad(chosen.valid, (past, 0), value=True)
    return Chosen(torch.cat([before, chosen.index + past], -1), valid)


def _take(x: Tensor, chosen: Chosen) -> Tensor:
    """Pick tokens of ``[batch, heads, tokens, dim]``, row by row: whole vectors are copied at once."""
    rows = [own[:, index[0]] for own, index in zip(x, chosen.index, strict=True)]
    return torch.stack(rows) if len(rows) > 1 else rows[0][None]


def _restricted(mask: Tensor | None, chosen: Chosen, past: int) -> Tensor | None:
    """The mask restricted to ``T x T`` and what is ``past``; None where plain causal attention does.

    Empty slots see nothing but themselves and the past.
    """
    index, columns = chosen.index[:, 0], _behind(chosen, past)
    if mask is not None:
        both = zip(mask, index, columns.index[:, 0], strict=True)
        mask = torch.stack([own[:, rows[:, None], seen] for own, rows, seen in both])
    if columns.valid is None and (mask is not None or past == 0):
        return mask
    if mask is None:
        mask = causal_rows(index.shape[1], columns.index.shape[-1], index.device).repeat(len(index), 1, 1, 1)
    if columns.valid is None or chosen.valid is None:
        return mask
    opened, closed = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    mask = mask.masked_fill(~columns.valid[:, :, None, :], closed)
    # Else their rows would have nothing to look at.
    mask[..., past:].diagonal(dim1=-2, dim2=-1).masked_fill_(~chosen.valid, opened)
    return mask


def _with_completion(kept: Chosen, completion: Tensor, real: Tensor | None) -> Chosen:
    """The kept tokens of the prompt and all of the completion."""
    batch, tokens = completion.shape
    index = kept.index[:, 0] if kept.valid is None else kept.index[:, 0].masked_fill(~kept.valid[:, 0], tokens)
    attending = completion.new_zeros(batch, tokens + 1).scatter(1, index, True)[:, :tokens]
    attending |= completion if real is None else completion & real
    return choose_among(attending, counts_of(attending))

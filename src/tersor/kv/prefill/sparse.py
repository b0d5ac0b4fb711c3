"""Sparse prefill: a prompt attends only among the tokens that a selection picks in this layer (ZipVL, section 2.2).

The residual stream keeps every row. Queries, keys and values of the chosen tokens are gathered in their order, so that
a causal mask over the small problem is the original one restricted to them; all other rows of the output are zero, and
those tokens pass the layer by their residual connection and MLP alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tersor.kv.engine.layer import TAG, CompressedLayer, boolean_mask, causal_rows
from tersor.kv.prefill.hook import STATE, ForwardState, LayerRecord
from tersor.kv.selection.probes import ProbeScores, probe_scores
from tersor.kv.selection.ratio import Selection, Waiting
from tersor.kv.storage.segments import Chosen, everything

QueryMode = Literal["drop", "compute"]


@dataclass(frozen=True, kw_only=True)
class SparsePrefill:
    """Attention of a prompt among the tokens of ``selection``; what follows the prompt is dense over what is stored.

    ``query_mode``: ``"drop"`` leaves the output of other tokens at zero (the paper), ``"compute"`` restricts keys only.
    ``min_tokens``: rows with a shorter prompt keep every token. ``protect_text``: only visual tokens may be left out.

    A layer whose method has the same ``selection`` stores exactly the tokens that took part.
    """

    selection: Selection
    query_mode: QueryMode = "drop"
    min_tokens: int = 256
    protect_text: bool = False

    def __post_init__(self) -> None:
        if self.selection.per_head:
            raise ValueError(
                "a sparse prefill gathers one set of tokens for all heads, but this selection lets every head pick its "
                "own; use one choice a layer"
            )

    def attend(
        self,
        library: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Choose, note the choice, attend; see `Prefill.attend`. The choice is made without gradient."""
        layer: CompressedLayer | None = getattr(key, TAG, None)
        if key.shape[2] != query.shape[2] or (layer is not None and layer.seen != query.shape[2]):
            output: tuple[Tensor, Tensor | None] = library(
                module, query, key, value, attention_mask, dropout, scaling, **kwargs
            )
            return output
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        state: ForwardState | None = kwargs.get(STATE)
        completion = None if state is None or state.completion is None else state.completion.to(query.device)
        real = real_tokens(attention_mask)
        prompt = _without(real, completion)
        index: Any = module.layer_idx if layer is None else layer.layer_idx
        with torch.no_grad():
            kept, skipped = self.choose(
                query, key, attention_mask, prompt, layer, index, state, scaling=scaling, softcap=kwargs.get("softcap")
            )
        if skipped is not None:
            output = library(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
            return output
        attending = kept if completion is None else _with_completion(kept, completion, real)
        attend = attend_among if self.query_mode == "drop" else attend_to
        sparse = attend(library, module, query, key, value, attention_mask, attending, dropout, scaling, **kwargs)
        if state is not None and completion is not None and not state.method.storage.evicts and bool(completion.any()):
            sparse = _completion_dense(
                sparse, completion, library, module, query, key, value, attention_mask, dropout, scaling, **kwargs
            )
        return sparse, None

    def choose(
        self,
        query: Tensor,
        key: Tensor,
        attention_mask: Tensor | None,
        valid: Tensor | None,
        layer: CompressedLayer | None,
        index: int,
        state: ForwardState | None,
        *,
        scaling: float,
        softcap: float | None,
    ) -> tuple[Chosen, str | None]:
        """The tokens that take part, and why they are all there are or None; tells the layer and the state.

        ``valid``: tokens of the prompt, bool ``[batch, tokens]``, None where all are.
        """
        batch, _, tokens, _ = key.shape
        waiting = Waiting(key, valid, ProbeScores(), index, 0, self._protected(state, valid, batch, tokens, key.device))
        short = bool((waiting.lengths() < self.min_tokens).all())
        scores = None if short else self._probe(query, key, attention_mask, valid, index, scaling, softcap)
        if scores is None:
            kept = everything(batch, tokens, valid, key.device)
            mass = torch.ones(batch, device=key.device)
            skipped = "short" if short else "nothing to leave out"
        else:
            sums, counts = scores
            waiting.scores = ProbeScores(sums, counts)
            kept, others = self.selection.choose(waiting)
            mass = captured_mass(sums[:, 0], kept)
            if layer is not None and layer.method.selection == self.selection:
                layer.decide((kept, others), sums, counts)
            skipped = None
            if others.index.shape[-1] == 0:
                skipped = "nothing to leave out" if bool(torch.isfinite(sums).all()) else "scores not finite"
        if state is not None:
            prompt = valid if valid is not None else torch.ones(batch, tokens, dtype=torch.bool, device=key.device)
            state.records[index] = LayerRecord(kept, prompt, mass, skipped)
        return kept, skipped

    def _probe(
        self,
        query: Tensor,
        key: Tensor,
        attention_mask: Tensor | None,
        valid: Tensor | None,
        index: int,
        scaling: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor] | None:
        """What `probe_scores` returns; sums are NaN where a probed row is not finite."""
        scores = probe_scores(
            query,
            key,
            valid,
            query_window(attention_mask),
            lambda length: self.selection.probe_rows(length, layer=index, segment=0),
            per_head=False,
            scaling=scaling,
            softcap=softcap,
        )
        # Each row of attention sums to one unless it holds NaN, which `attention_rows` counts as zero.
        if scores is not None and bool((scores[0].sum((1, 2)) < 0.99 * scores[1].amax(-1)).any()):
            return torch.full_like(scores[0], torch.nan), scores[1]
        return scores

    def _protected(
        self, state: ForwardState | None, valid: Tensor | None, batch: int, tokens: int, device: torch.device
    ) -> Tensor | None:
        """Tokens that must stay: those of short rows, and text where the user says so."""
        protected = None
        if valid is not None and self.min_tokens > 0:
            protected = (valid.sum(-1, keepdim=True) < self.min_tokens).expand(batch, tokens)
        if self.protect_text and state is not None and state.visual is not None:
            text = ~state.visual.to(device)
            protected = text if protected is None else protected | text
        return protected


def real_tokens(mask: Tensor | None) -> Tensor | None:
    """Tokens that are no padding, bool ``[batch, tokens]``: those that look at themselves. None where all do.

    ``mask``: of a whole prompt ``[batch, heads or 1, tokens, tokens]``, bool or additive, None for plain causal.
    """
    if mask is None:
        return None
    real = boolean_mask(mask[:, 0].diagonal(dim1=-2, dim2=-1))
    return None if bool(real.all()) else real


def query_window(mask: Tensor | None) -> Tensor | None:
    """Where each query may look, bool ``[batch, queries, columns]``, None for plain causal attention."""
    if mask is None:
        return None
    return boolean_mask(mask[:, 0])


def captured_mass(sums: Tensor, kept: Chosen) -> Tensor:
    """Share of the attention ``sums`` ``[batch, tokens]`` that the ``kept`` tokens hold, ``[batch]``; 1 without any."""
    held = sums.gather(1, kept.index[:, 0])
    if kept.valid is not None:
        held = held.masked_fill(~kept.valid[:, 0], 0.0)
    total = sums.sum(-1)
    return torch.where(total > 0, held.sum(-1) / total.clamp_min(torch.finfo(total.dtype).tiny), 1.0)


def attend_among(
    library: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    chosen: Chosen,
    dropout: float,
    scaling: float,
    **kwargs: Any,
) -> Tensor:
    """``O[T] = Attn(Q[T], K[T], V[T])`` under the mask restricted to ``T x T``, and ``O[U] = 0``.

    Shapes are the library's: ``query`` ``[batch, heads, tokens, dim]``, output ``[batch, tokens, heads, value_dim]``.
    ``chosen``: the tokens ``T`` of each row, ascending.
    """
    batch, heads, tokens, _ = query.shape
    output = query.new_zeros(batch, tokens, heads, value.shape[-1])
    if chosen.index.shape[-1] == 0:
        return output
    own = _take(query, chosen), _take(key, chosen), _take(value, chosen)
    small, _ = library(module, *own, _restricted(mask, chosen), dropout, scaling, **kwargs)
    for row in range(batch):
        slots = slice(None) if chosen.valid is None else chosen.valid[row, 0]
        output[row, chosen.index[row, 0][slots]] = small[row][slots]
    return output


def attend_to(
    library: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    chosen: Chosen,
    dropout: float,
    scaling: float,
    **kwargs: Any,
) -> Tensor:
    """``O = Attn(Q, K[T], V[T])``: every query, restricted keys. A query that sees none of them gets zero."""
    batch, heads, tokens, _ = query.shape
    if chosen.index.shape[-1] == 0:
        return query.new_zeros(batch, tokens, heads, value.shape[-1])
    index = chosen.index[:, 0]
    if mask is None:
        allowed = index[:, None, None, :] <= torch.arange(tokens, device=index.device)[:, None]
    else:
        allowed = boolean_mask(torch.stack([own[..., picked] for own, picked in zip(mask, index, strict=True)]))
    if chosen.valid is not None:
        allowed = allowed & chosen.valid[:, :, None, :]
    sees = allowed.any(-1, keepdim=True)
    output, _ = library(
        module, query, _take(key, chosen), _take(value, chosen), allowed | ~sees, dropout, scaling, **kwargs
    )
    return torch.where(sees.transpose(1, 2), output, 0.0)


def _completion_dense(
    output: Tensor,
    completion: Tensor,
    library: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float,
    **kwargs: Any,
) -> Tensor:
    """``output`` with the rows of the completion replaced: where nothing is evicted, they see the whole prompt."""
    tokens = query.shape[2]
    start = int(completion.any(0).nonzero()[0])
    rows = causal_rows(tokens - start, tokens, query.device)[None] if mask is None else mask[:, :, start:]
    late, _ = library(module, query[:, :, start:], key, value, rows, dropout, scaling, **kwargs)
    late = torch.where(completion[:, start:, None, None], late, output[:, start:])
    return torch.cat([output[:, :start], late], dim=1)


def _take(x: Tensor, chosen: Chosen) -> Tensor:
    """Pick tokens of ``[batch, heads, tokens, dim]``, row by row: whole vectors are copied at once."""
    rows = [own[:, index[0]] for own, index in zip(x, chosen.index, strict=True)]
    return torch.stack(rows) if len(rows) > 1 else rows[0][None]


def _restricted(mask: Tensor | None, chosen: Chosen) -> Tensor | None:
    """The mask restricted to ``T x T``; None where plain causal attention does. Empty slots see themselves only."""
    index = chosen.index[:, 0]
    if mask is not None:
        mask = torch.stack([own[:, i[:, None], i] for own, i in zip(mask, index, strict=True)])
    if chosen.valid is None:
        return mask
    count = index.shape[1]
    if mask is None:
        mask = torch.ones(count, count, dtype=torch.bool, device=index.device).tril().repeat(len(index), 1, 1, 1)
    opened, closed = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    mask = mask.masked_fill(~chosen.valid[:, :, None, :], closed)
    # Else their rows would have nothing to look at.
    mask.diagonal(dim1=-2, dim2=-1).masked_fill_(~chosen.valid, opened)
    return mask


def _without(real: Tensor | None, completion: Tensor | None) -> Tensor | None:
    """Tokens of the prompt, None where every token is one."""
    if completion is None or not bool(completion.any()):
        return real
    return ~completion if real is None else real & ~completion


def _with_completion(kept: Chosen, completion: Tensor, real: Tensor | None) -> Chosen:
    """The kept tokens of the prompt and all of the completion."""
    batch, tokens = completion.shape
    index = kept.index[:, 0] if kept.valid is None else kept.index[:, 0].masked_fill(~kept.valid[:, 0], tokens)
    attending = completion.new_zeros(batch, tokens + 1).scatter(1, index, True)[:, :tokens]
    attending |= completion if real is None else completion & real
    return everything(batch, tokens, attending, completion.device)

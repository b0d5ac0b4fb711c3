"""Sparse prefills to compare ZipVL with: a fixed share of every layer, random tokens, and FastV's choice made once.

They run in the same engine and differ in the choice of tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.kv.engine.call import AttentionCall
from tersor.kv.method import KVMethod
from tersor.kv.prefill.sparse import SparsePrefill, layer_index
from tersor.kv.selection.base import Chosen, Waiting, choose_none
from tersor.kv.selection.mass import PromptSelection
from tersor.kv.selection.probes import seeded_generator
from tersor.kv.storage.mixed import MixedPrecisionStorage


@dataclass(frozen=True, kw_only=True)
class ShareSelection(PromptSelection):
    """A given share of each layer's tokens, ranked as ZipVL ranks them; protected tokens come first and count.

    Args:
        ratios: One share a layer of the model, or one for all.
        of_unprotected: Whether it is a share of the tokens that are not protected.
    """

    ratios: tuple[float, ...]
    of_unprotected: bool = False

    def ratio(self, layer: int) -> float:
        return self.ratios[0] if len(self.ratios) == 1 else self.ratios[layer]

    def keeps_all(self, layer: int) -> bool:
        return self.ratio(layer) >= 1.0

    def count(self, sums: Tensor, waiting: Waiting) -> Tensor:
        length, ratio = waiting.lengths().double(), self.ratio(waiting.layer)
        if not self.of_unprotected:
            return (ratio * length).round().long().clamp_min(1)
        protected = self.protected(waiting)
        if waiting.valid is not None:
            protected = protected & waiting.valid
        held = protected.sum(-1)
        return held + (ratio * (length - held)).round().long()

    def ranking(self, sums: Tensor, counts: Tensor, waiting: Waiting) -> Tensor:
        return super().ranking(sums, counts, waiting).masked_fill(self.protected(waiting), torch.inf)


@dataclass(frozen=True, kw_only=True)
class RandomShareSelection(ShareSelection):
    """The same number of tokens, drawn at random from (seed, layer): the floor of any selection."""

    def ranking(self, sums: Tensor, counts: Tensor, waiting: Waiting) -> Tensor:
        draw = torch.rand(sums.shape[1], generator=seeded_generator(self.seed, waiting.layer)).to(sums.device)
        rank = draw[waiting.places().clamp_min(0)]
        return rank.masked_fill(self.protected(waiting), torch.inf)


@dataclass(frozen=True, kw_only=True)
class OncePrefill(SparsePrefill):
    """Chooses in layer ``first`` and uses that choice in every later one: its other tokens are gone, as in FastV."""

    first: int

    def choose(self, call: AttentionCall, prompt: Tensor | None) -> tuple[Chosen, str | None]:
        layer, state, index = call.layer, call.state, layer_index(call)
        made = None if state is None else state.records.get(self.first)
        if made is None or index <= self.first:
            return super().choose(call, prompt)
        if layer is not None and made.skipped is None:
            batch, _, tokens, _ = call.key.shape
            unscored = call.key.new_zeros(batch, 1, tokens, dtype=torch.float32)
            layer.decide((made.kept, choose_none(batch, call.key.device)), unscored, unscored[:, 0])
        state.records[index] = made
        return made.kept, made.skipped


def fixed_share(ratios: float | Sequence[float], *, min_tokens: int = 256, **settings: Any) -> KVMethod:
    """Fixed shares instead of ``tau``; ``settings`` are those of `ShareSelection`. Other tokens are evicted."""
    return _evicting("fixed share", ShareSelection(ratios=_tuple(ratios), **settings), min_tokens)


def random_share(
    ratios: float | Sequence[float], *, min_tokens: int = 256, visual_only: bool = False, **settings: Any
) -> KVMethod:
    """Random tokens at given shares; otherwise as `fixed_share`.

    Args:
        ratios: One share a layer, or one for all.
        min_tokens: Shorter prompts are read densely.
        visual_only: Only visual tokens are left out, and the shares are of them; otherwise of all tokens.
        **settings: Those of `ShareSelection`.
    """
    selection = RandomShareSelection(ratios=_tuple(ratios), of_unprotected=visual_only, **settings)
    return _evicting("random share", selection, min_tokens, protect_text=visual_only)


def fastv(ratio: float = 0.5, *, dense_layers: int = 2, min_tokens: int = 256, visual_only: bool = True) -> KVMethod:
    """FastV-like: the first layers are dense, then a share of the (visual) tokens goes on, chosen once.

    Tokens are ranked by the attention of the last prompt token in the first sparse layer.

    Args:
        ratio: Share of the tokens that goes on.
        dense_layers: Number of dense layers.
        min_tokens: Shorter prompts are read densely.
        visual_only: Only visual tokens are left out, and ``ratio`` is a share of them; otherwise one of all tokens.
    """
    selection = ShareSelection(
        ratios=(ratio,), probe_recent=1, probe_random=0, select_by="raw", of_unprotected=visual_only
    )
    prefill = OncePrefill(selection=selection, min_tokens=min_tokens, protect_text=visual_only, first=dense_layers)
    return _method("fastv", selection, prefill, tuple(range(dense_layers)))


def _tuple(ratios: float | Sequence[float]) -> tuple[float, ...]:
    return (ratios,) if isinstance(ratios, (int, float)) else tuple(ratios)


def _evicting(name: str, selection: PromptSelection, min_tokens: int, *, protect_text: bool = False) -> KVMethod:
    prefill = SparsePrefill(selection=selection, min_tokens=min_tokens, protect_text=protect_text)
    return _method(name, selection, prefill, ())


def _method(name: str, selection: PromptSelection, prefill: SparsePrefill, skip_layers: tuple[int, ...]) -> KVMethod:
    return KVMethod(
        name=name,
        selection=selection,
        storage=MixedPrecisionStorage(high_bits=16, low_bits=0),
        prefill=prefill,
        streaming_gap=None,
        min_tokens_to_compress=None,
        skip_layers=skip_layers,
    )

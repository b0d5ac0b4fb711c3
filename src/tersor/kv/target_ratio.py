"""Find the ``tau`` that keeps a wanted share of the tokens, from a few of the user's own samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tersor.kv.prefill.sparse import SparsePrefill
from tersor.kv.selection.mass import MassSelection
from tersor.kv.selection.ratio import Waiting
from tersor.kv.storage.segments import Chosen, everything, nothing

if TYPE_CHECKING:
    from tersor.kv.method import KVMethod
    from tersor.kv.zipvl import ZipVL

#: Steps of each bisection; tau is then known to about 1e-6.
STEPS = 20
#: Forwards over all samples that check a tau and correct the next one.
ROUNDS = 3
#: A measured ratio this close to the wanted one is good.
CLOSE = 0.01


@dataclass(frozen=True, kw_only=True)
class _Noting(MassSelection):
    """Probes like `MassSelection` but keeps every token, and notes the scores."""

    noted: list[Waiting] = field(default_factory=list, compare=False)

    def choose(self, waiting: Waiting) -> tuple[Chosen, Chosen]:
        batch, _, tokens, _ = waiting.keys.shape
        self.noted.append(replace(waiting, keys=waiting.keys.new_empty(batch, 1, tokens, 0)))
        return everything(batch, tokens, waiting.valid, waiting.keys.device), nothing(batch, waiting.keys.device)


def find_tau(recipe: ZipVL, model: PreTrainedModel, samples: Sequence[Mapping[str, Any]], ratio: float) -> float:
    """The ``tau`` at which ``recipe`` keeps about ``ratio`` of the tokens of ``samples``, mean over samples and layers.

    Every sample is read densely once and its scores are noted; bisection on them needs no further forwards. Sparse
    layers change what later layers see, so the ratio is then measured, and the goal corrected by what it missed.

    Raises:
        ValueError: without samples, or if the ratio is not reached within 0.1.
    """
    if not samples or not 0.0 < ratio < 1.0:
        raise ValueError(
            f"got {len(samples)} samples and ratio={ratio}; it takes at least one, and a ratio inside (0, 1)"
        )
    method = recipe.method()
    prefill: SparsePrefill = method.prefill  # type: ignore[assignment]
    selection: MassSelection = prefill.selection  # type: ignore[assignment]
    noting = _Noting(**{name: getattr(selection, name) for name in MassSelection.__dataclass_fields__} | {"tau": 0.5})
    noted: list[list[Waiting]] = []
    dense = replace(method, prefill=replace(prefill, selection=noting))
    for sample in samples:
        _measure(dense, model, sample)
        noted.append(list(noting.noted))
        noting.noted.clear()
    layers = model.config.get_text_config(decoder=True).num_hidden_layers

    def expected(tau: float) -> float:
        """Mean ratio by the noted scores; layers without any keep everything."""
        chosen = replace(selection, tau=tau)
        shares = [sum(_ratio(chosen, each) for each in own) + layers - len(own) for own in noted]
        return sum(shares) / len(shares) / layers

    goal, best, found = ratio, float("inf"), 1.0
    for _ in range(ROUNDS):
        low, high = 0.0, 1.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if expected(middle) < goal else (low, middle)
        tau = (low + high) / 2
        measured = sum(
            _measure(replace(method, prefill=_with_tau(prefill, tau)), model, sample) for sample in samples
        ) / len(samples)
        if abs(measured - ratio) < best:
            best, found = abs(measured - ratio), tau
        if best <= CLOSE:
            break
        goal = min(max(goal + ratio - measured, 0.0), 1.0)
    if best > 0.1:
        raise ValueError(
            f"no tau keeps {ratio:.0%} of the tokens of these samples: the closest misses by {best:.0%}. Prompts "
            f"shorter than min_tokens={recipe.min_tokens}, skip_layers and protected tokens keep more"
        )
    return found


def _with_tau(prefill: SparsePrefill, tau: float) -> SparsePrefill:
    return replace(prefill, selection=replace(prefill.selection, tau=tau))  # type: ignore[type-var]


def _ratio(selection: MassSelection, waiting: Waiting) -> float:
    kept = selection.choose(waiting)[0]
    counts: Tensor = torch.tensor(kept.index.shape[-1]) if kept.valid is None else kept.valid[:, 0].sum(-1)
    return float((counts / waiting.lengths().clamp_min(1)).mean())


def _measure(method: KVMethod, model: PreTrainedModel, sample: Mapping[str, Any]) -> float:
    """Read one prompt; returns the mean ratio of its tokens."""
    with method.on(model) as session, torch.no_grad():
        model(**sample, past_key_values=method.cache(model.config), use_cache=True)
        return session.stats.token_ratio

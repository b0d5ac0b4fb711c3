"""Find the ``tau`` that keeps a wanted share of the tokens, from a few of the user's own samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from tersor._compat import with_cache
from tersor._errors import TersorError
from tersor.kv.engine.choices import pick
from tersor.kv.engine.state import ForwardState
from tersor.kv.method import KVMethod
from tersor.kv.selection.base import Chosen, Waiting
from tersor.kv.selection.mass import MassSelection

#: Steps of each bisection; tau is then known to about 1e-6.
STEPS = 20
#: Forwards over all samples that check a tau and correct the next one.
ROUNDS = 3
#: A measured ratio this close to the wanted one is good.
CLOSE = 0.01


@dataclass(frozen=True, kw_only=True)
class ProbeOnly(MassSelection):
    """Probes like `MassSelection` and keeps every token."""

    def keeps_all(self, layer: int) -> bool:
        return False

    def choose(self, waiting: Waiting) -> tuple[Chosen, Chosen]:
        return waiting.all_important()


def find_tau(
    selection: MassSelection,
    method_of: Callable[[MassSelection], KVMethod],
    model: PreTrainedModel,
    samples: Sequence[Mapping[str, Any]],
    ratio: float,
) -> float:
    """The ``tau`` at which about ``ratio`` of the tokens of ``samples`` are kept, mean over samples and layers.

    Every sample is read densely once and its scores are noted; bisection on them needs no further forwards. Sparse
    layers change what later layers see, so the ratio is then measured, and the goal corrected by what it missed.

    Args:
        selection: How tokens are scored; its own ``tau`` does not matter.
        method_of: Makes the method whose sparse prefill uses a selection.
        model: The model that reads the samples.
        samples: Keywords of the model, one mapping a prompt.
        ratio: Share of tokens to keep.

    Raises:
        ValueError: Without samples, or if the ratio is not reached within 0.1.
    """
    if not samples or not 0.0 < ratio < 1.0:
        raise TersorError(
            f"got {len(samples)} samples and ratio={ratio}; it takes at least one, and a ratio inside (0, 1)"
        )
    probing = method_of(pick(ProbeOnly, selection))
    noted = []
    for sample in samples:
        records = _read(probing, model, sample)[1].records.values()
        noted.append([record.scored for record in records if record.scored is not None])
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
        method = method_of(replace(selection, tau=tau))
        measured = sum(_read(method, model, sample)[0] for sample in samples) / len(samples)
        if abs(measured - ratio) < best:
            best, found = abs(measured - ratio), tau
        if best <= CLOSE:
            break
        goal = min(max(goal + ratio - measured, 0.0), 1.0)
    if best > 0.1:
        raise TersorError(
            f"no tau keeps {ratio:.0%} of the tokens of these samples: the closest misses by {best:.0%}. Prompts "
            "shorter than min_tokens, skip_layers and protected tokens keep more"
        )
    return found


def _ratio(selection: MassSelection, waiting: Waiting) -> float:
    """Share of the tokens that the selection keeps, mean over rows."""
    counts = selection.choose(waiting)[0].slots[:, 0].sum(-1)
    return float((counts / waiting.lengths().clamp_min(1)).mean())


def _read(method: KVMethod, model: PreTrainedModel, sample: Mapping[str, Any]) -> tuple[float, ForwardState]:
    """Read one prompt; returns the mean ratio of its tokens and what happened in each layer."""
    with method.on(model) as session, torch.no_grad():
        model(**sample, **with_cache(method.cache(model.config)), use_cache=True)
        assert session.state is not None
        return session.stats.token_ratio, session.state

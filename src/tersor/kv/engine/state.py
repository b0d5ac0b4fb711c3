"""What one forward over a prompt knows beyond the tensors that attention gets.

A hook on the top-level model (`tersor.kv.prefill.hook`) puts a `ForwardState` among the forward's keywords, and the
model hands it down to every attention call. As an argument of each layer it is there again when gradient checkpointing
computes the layer a second time in the backward pass; a global variable or a ``with`` block around the forward would be
gone by then.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tersor._errors import TersorError
from tersor.kv.engine.choices import Choices
from tersor.kv.selection.base import Chosen, Waiting

#: Keyword under which a forward's state travels to the attention function.
STATE = "tersor_state"
#: Keyword of the user: bool ``[batch, tokens]``, True where a token belongs to a completion and not to the prompt.
COMPLETION = "completion_mask"
#: Keyword of the user: `RowThresholds` of a forward, where those of the session do not hold.
THRESHOLDS = "thresholds"


@dataclass(frozen=True)
class LayerRecord:
    """What a sparse prefill did in one layer.

    Args:
        kept: Tokens in the attention, columns of the input.
        prompt: The tokens it was chosen from, bool ``[batch, tokens]``.
        skipped: Why every token was kept, or None.
        scored: What the selection chose from, without the channels of the keys; None where nothing was probed.
    """

    kept: Chosen
    prompt: Tensor
    skipped: str | None
    scored: Waiting | None = None

    @property
    def mass(self) -> Tensor:
        """Share of the attention that the kept tokens hold, ``[batch]``; 1 where nothing was probed."""
        sums = None if self.scored is None else self.scored.scores.sums
        if sums is None:
            return torch.ones(len(self.prompt), device=self.prompt.device)
        return captured_mass(sums[:, 0].detach(), self.kept)


def captured_mass(sums: Tensor, kept: Chosen) -> Tensor:
    """Share of the attention ``sums`` ``[batch, tokens]`` that the ``kept`` tokens hold, ``[batch]``; 1 without any."""
    held = sums.gather(1, kept.index[:, 0])
    if kept.valid is not None:
        held = held.masked_fill(~kept.valid[:, 0], 0.0)
    total = sums.sum(-1)
    return torch.where(total > 0, held.sum(-1) / total.clamp_min(torch.finfo(total.dtype).tiny), 1.0)


@dataclass(frozen=True)
class RowThresholds:
    """A threshold for each row of a prompt, instead of the method's one; a row of 1 is read densely.

    Args:
        tau: Share of the attention that a row must hold, above 0 and at most 1, ``[batch]``; kept as float64.
        differentiable: Whether the scores by which tokens are chosen keep their gradient, for the loss of a training
            (`tersor.rl.soft_token_ratio`). Costs the memory of the probed rows of attention.

    Raises:
        ValueError: For shares outside their range, or another shape.
    """

    tau: Tensor
    differentiable: bool = False

    def __post_init__(self) -> None:
        tau = torch.as_tensor(self.tau, dtype=torch.float64).detach()
        if tau.ndim != 1 or not bool(((tau > 0) & (tau <= 1)).all()):
            raise TersorError(f"thresholds={self.tau} must be one share a row, each above 0 and at most 1")
        object.__setattr__(self, "tau", tau)


@dataclass
class ForwardState:
    """One forward over a prompt.

    Args:
        choices: The method's choices.
        layers: Layers that may be sparse.
        visual: Tokens that show an image or a video, bool ``[batch, tokens]``; None where not known.
        completion: Tokens that follow the prompt, bool ``[batch, tokens]``; None where not known.
        thresholds: Share of the attention that must be held, by row; None for the method's own.
        records: What happened, by layer.
    """

    choices: Choices
    layers: frozenset[int]
    visual: Tensor | None = None
    completion: Tensor | None = None
    thresholds: RowThresholds | None = None
    records: dict[int, LayerRecord] = field(default_factory=dict)
    _everything: Tensor | None = field(default=None, repr=False)

    def everything(self, like: Tensor) -> Tensor:
        """Every token of a prompt with the keys ``like``, bool ``[batch, tokens]``; the same for all layers."""
        if self._everything is None:
            self._everything = torch.ones(len(like), like.shape[2], dtype=torch.bool, device=like.device)
        return self._everything

    def covers(self, module: nn.Module, options: dict[str, Any]) -> bool:
        """Whether ``module`` is an attention layer of the text decoder that may be sparse without a cache."""
        own = getattr(module, "is_causal", True) and "Cross" not in type(module).__name__
        if self.completion is None or not own or options.get("sliding_window"):
            return False
        return getattr(module, "layer_idx", None) in self.layers


class UncachedPrompt:
    """Where the prompt of a ``generate(use_cache=False)`` ends; its first forward tells."""

    tokens: int | None = None

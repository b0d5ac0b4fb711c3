"""What one forward over a prompt knows beyond the tensors that attention gets.

A hook on the top-level model (`tersor.kv.prefill.hook`) puts a `ForwardState` among the forward's keywords, and the
model hands it down to every attention call. As an argument of each layer it is there again when gradient checkpointing
computes the layer a second time in the backward pass; a global variable or a ``with`` block around the forward would be
gone by then.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tersor.kv.engine.choices import Choices
from tersor.kv.selection.base import Chosen, Waiting

#: Keyword under which a forward's state travels to the attention function.
STATE = "tersor_state"
#: Keyword of the user: bool ``[batch, tokens]``, True where a token belongs to a completion and not to the prompt.
COMPLETION = "completion_mask"


@dataclass(frozen=True)
class LayerRecord:
    """What a sparse prefill did in one layer.

    Args:
        kept: Tokens in the attention, columns of the input.
        prompt: The tokens it was chosen from, bool ``[batch, tokens]``.
        mass: Share of the attention that the kept tokens hold, ``[batch]``.
        skipped: Why every token was kept, or None.
        scored: What the selection chose from, without the channels of the keys; None where nothing was probed.
    """

    kept: Chosen
    prompt: Tensor
    mass: Tensor
    skipped: str | None
    scored: Waiting | None = None


@dataclass
class ForwardState:
    """One forward over a prompt.

    Args:
        choices: The method's choices.
        layers: Layers that may be sparse.
        visual: Tokens that show an image or a video, bool ``[batch, tokens]``; None where not known.
        completion: Tokens that follow the prompt, bool ``[batch, tokens]``; None where not known.
        records: What happened, by layer.
    """

    choices: Choices
    layers: frozenset[int]
    visual: Tensor | None = None
    completion: Tensor | None = None
    records: dict[int, LayerRecord] = field(default_factory=dict)

    def covers(self, module: nn.Module, options: dict[str, Any]) -> bool:
        """Whether ``module`` is an attention layer of the text decoder that may be sparse without a cache."""
        own = getattr(module, "is_causal", True) and "Cross" not in type(module).__name__
        if self.completion is None or not own or options.get("sliding_window"):
            return False
        return getattr(module, "layer_idx", None) in self.layers


class UncachedPrompt:
    """Where the prompt of a ``generate(use_cache=False)`` ends; its first forward tells."""

    tokens: int | None = None

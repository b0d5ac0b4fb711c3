"""One call of an attention function, with the arguments that transformers passes, and how the library answers it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tersor.kv.selection.probes import Queries

#: Keywords of attention variants that only the model's own eager function implements.
EAGER_ONLY = ("softcap", "s_aux", "output_attentions")


@dataclass(frozen=True)
class AttentionCall:
    """What a model asks its attention function.

    Args:
        module: The model's attention layer.
        query: ``[batch, heads, queries, key_dim]``.
        key: ``[batch, kv_heads, columns, key_dim]``.
        value: ``[batch, kv_heads, columns, value_dim]``.
        mask: Bool or additive ``[batch, heads or 1, queries, sequence]``; None for plain causal attention.
        scaling: Factor of the scores.
        dropout: Share of the weights that training leaves out.
        options: Further keywords of the library, such as ``softcap`` and ``position_ids``.
        layer: The `CompressedLayer` that holds the keys, or None in a forward without a cache.
        state: The `ForwardState` of a forward whose prefill is sparse, or None.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    dropout: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    layer: Any = None
    state: Any = None

    @cached_property
    def open(self) -> Tensor | None:
        """Where a query may look, bool like ``mask``; None for plain causal attention."""
        return None if self.mask is None else boolean_mask(self.mask)

    def queries(self, lse: Tensor | None = None) -> Queries:
        """The queries as probes see them; ``lse`` is their rows' log-sum-exp where it is known."""
        return Queries(self.query, self.scaling, self.options.get("softcap"), lse)

    def given(self, *names: str) -> list[str]:
        """Those of the options ``names`` that the model makes use of."""
        return [name for name in names if self.options.get(name) is not None and self.options[name] is not False]

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """What the model would do without tersor: SDPA, or its own eager function where SDPA lacks a feature.

        Raises:
            NotImplementedError: If SDPA lacks a feature and the model has no eager function.
        """
        settings = {"dropout": self.dropout, "scaling": self.scaling, **self.options}
        needed = self.given(*EAGER_ONLY)
        if not needed:
            function = ALL_ATTENTION_FUNCTIONS["sdpa"]
            return function(self.module, self.query, self.key, self.value, self.mask, **settings)
        eager = getattr(sys.modules[type(self.module).__module__], "eager_attention_forward", None)
        if eager is None:
            raise NotImplementedError(
                f"{type(self.module).__name__} asks for {needed}, which SDPA lacks, and has no eager attention to fall "
                "back on; run this model without tersor"
            )
        return eager(self.module, self.query, self.key, self.value, self._additive_mask(), **settings)

    def _additive_mask(self) -> Tensor | None:
        """The mask as eager attention functions want it: 0 where open, the lowest number where closed."""
        mask, queries = self.mask, self.query.shape[2]
        if mask is None and queries > 1:
            mask = causal_rows(queries, self.key.shape[2], self.query.device)[:, None]
        if mask is None or mask.dtype != torch.bool:
            return mask
        closed = torch.finfo(self.query.dtype).min
        return torch.zeros(mask.shape, dtype=self.query.dtype, device=mask.device).masked_fill(~mask, closed)


def boolean_mask(mask: Tensor) -> Tensor:
    """Where a query may look; an additive mask is open where it does not push scores to the bottom."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def causal_rows(queries: int, columns: int, device: torch.device) -> Tensor:
    """Plain causal attention of the last ``queries`` of ``columns`` tokens: bool ``[1, queries, columns]``."""
    row = torch.arange(columns - queries, columns, device=device)[:, None]
    return (torch.arange(columns, device=device) <= row)[None]

"""One call of an attention function, with the arguments that transformers passes, and how the library answers it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache as once
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tersor._errors import UnsupportedError
from tersor.kv.selection.probes import Queries

#: The attention functions of tersor: masks and kernels as SDPA takes them, or, for models that SDPA cannot compute, as
#: the model's own eager function does.
ATTENTION_NAME, EAGER_ATTENTION_NAME = "tersor", "tersor_eager"
#: Keywords of attention variants that SDPA does not compute, whether a model's eager function names them or not.
EAGER_ONLY = ("softcap", "s_aux", "sinks", "output_attentions")
#: Keywords that change no output of attention, or that the mask and SDPA hold already.
HARMLESS = frozenset(
    (
        *("position_ids", "cache_position", "position_embeddings", "logits_to_keep", "layer_idx"),
        *("use_cache", "return_dict", "output_hidden_states", "output_router_logits", "num_items_in_batch"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "target_dtype"),
        *("is_causal", "sliding_window", "attention_chunk_size"),
    )
)


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
        own: Whether the model computes its attention by its own eager function alone.
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
    own: bool = False

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

    @cached_property
    def beyond_sdpa(self) -> list[str]:
        """Why SDPA does not compute this call: keywords that it does not know and the model's eager function does.

        A keyword is also one of them where the model has no eager function and nothing else says that it is harmless.
        """
        if self.own:
            return [f"{type(self.module).__name__}'s own attention"]
        eager = eager_attention(self.module)
        own = sorted(self.options.keys() - _known_to_sdpa()) if eager is None else _beyond_sdpa(eager)
        return self.given(*EAGER_ONLY, *own)

    def over_stored(self) -> AttentionCall:
        """The same call over the whole sequence in model precision, where segments hold a part of it."""
        keys, values, present = self.layer.dequantize()
        return replace(self, key=keys, value=values, mask=self._close_absent(present))

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """What the model would do without tersor: SDPA, or its own eager function where SDPA lacks a feature.

        Raises:
            NotImplementedError: If SDPA lacks a feature and the model has no eager function.
        """
        settings = {"dropout": self.dropout, "scaling": self.scaling, **self.options}
        if not self.beyond_sdpa:
            function = ALL_ATTENTION_FUNCTIONS["sdpa"]
            return function(self.module, self.query, self.key, self.value, self._sdpa_mask(), **settings)
        eager = eager_attention(self.module)
        if eager is None:
            raise UnsupportedError(
                f"{type(self.module).__name__} asks for {self.beyond_sdpa}, which SDPA lacks, and has no eager "
                "attention to fall back on; run this model without tersor"
            )
        return eager(self.module, self.query, self.key, self.value, self._additive_mask(), **settings)

    def _close_absent(self, present: Tensor) -> Tensor | None:
        """The mask without the tokens that are not stored (``present`` is bool ``[batch, kv_heads, sequence]``)."""
        if bool(present.all()):
            return self.mask
        groups = self.query.shape[1] // present.shape[1]
        stored = present.repeat_interleave(groups, dim=1)[:, :, None, :]
        if self.mask is None:
            return stored & causal_rows(self.query.shape[2], present.shape[-1], self.query.device)[:, None]
        if self.mask.dtype == torch.bool:
            return self.mask & stored
        return self.mask.masked_fill(~stored, torch.finfo(self.mask.dtype).min)

    def _sdpa_mask(self) -> Tensor | None:
        """The mask as SDPA wants it, which without one takes the queries for the first tokens and not for the last.

        Layers that read another layer's keys may compute the rows whose logits are wanted and no others.
        """
        queries, columns = self.query.shape[2], self.key.shape[2]
        if self.mask is not None or not 1 < queries < columns or not getattr(self.module, "is_causal", False):
            return self.mask
        return causal_rows(queries, columns, self.query.device)[:, None]

    def _additive_mask(self) -> Tensor | None:
        """The mask as eager attention functions want it: 0 where open, the lowest number where closed."""
        mask, queries = self.mask, self.query.shape[2]
        if mask is None and queries > 1:
            mask = causal_rows(queries, self.key.shape[2], self.query.device)[:, None]
        if mask is None or mask.dtype != torch.bool:
            return mask
        closed = torch.finfo(self.query.dtype).min
        return torch.zeros(mask.shape, dtype=self.query.dtype, device=mask.device).masked_fill(~mask, closed)


def eager_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """The eager attention function of the model that ``module`` belongs to, where it has one."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


@once
def _known_to_sdpa() -> frozenset[str]:
    """Keywords that SDPA computes, that change nothing, or that `EAGER_ONLY` lists."""
    sdpa = inspect.signature(ALL_ATTENTION_FUNCTIONS["sdpa"]).parameters
    return frozenset(sdpa) | HARMLESS | frozenset(EAGER_ONLY)


@once
def _beyond_sdpa(eager: Callable[..., Any]) -> tuple[str, ...]:
    """Keywords that an eager attention function computes and SDPA does not."""
    return tuple(sorted(inspect.signature(eager).parameters.keys() - _known_to_sdpa()))


def boolean_mask(mask: Tensor) -> Tensor:
    """Where a query may look; an additive mask is open where it does not push scores to the bottom."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def causal_rows(queries: int, columns: int, device: torch.device) -> Tensor:
    """Plain causal attention of the last ``queries`` of ``columns`` tokens: bool ``[1, queries, columns]``."""
    row = torch.arange(columns - queries, columns, device=device)[:, None]
    return (torch.arange(columns, device=device) <= row)[None]

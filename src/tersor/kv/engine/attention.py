"""The attention function ``tersor`` and its mask function, registered with transformers once.

For a tagged key (see `tersor.kv.engine.layer`) it computes attention over segments and buffer and reports the
queries to the layer; every other call goes to the library's own implementation untouched.
"""

from __future__ import annotations

import sys
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tersor.kv.engine.layer import ATTENTION_NAME, TAG, CompressedLayer, boolean_mask, causal_rows
from tersor.kv.prefill.hook import STATE, ForwardState
from tersor.lowbit.kernels import get_kernel

#: Keywords of attention variants that only the model's own eager function implements.
EAGER_ONLY = ("softcap", "s_aux", "output_attentions")
#: Keywords that the packed kernel does not implement either.
UNFUSED = (*EAGER_ONLY, "position_bias", "sliding_window")


def tersor_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention for transformers' `AttentionInterface`; shapes and return value are the library's.

    Raises:
        RuntimeError: when a compressed cache is used while training, since compression has no gradient.
        ValueError: when the mask does not cover the cached sequence.
    """
    layer: CompressedLayer | None = getattr(key, TAG, None)
    state: ForwardState | None = kwargs.get(STATE)
    if state is not None or (layer is not None and layer.method.sparse):
        _without_weights(kwargs)
    if layer is None:
        attend = library_attention
        if state is not None and state.covers(module, kwargs):
            attend = partial(state.method.prefill.attend, library_attention)
        return attend(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    _check(module, layer, query, attention_mask)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = None if attention_mask is None else boolean_mask(attention_mask)
    lse = weights = None
    if not layer.segments:
        output, weights = layer.method.prefill.attend(
            library_attention, module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    elif _fusable(attention_mask, dropout, kwargs):
        kernel = get_kernel("packed_attention", device=query.device.type)
        output, lse = kernel(query, layer.parts(mask, query, scaling=scaling), scaling=scaling)
        output = output.transpose(1, 2).to(query.dtype).contiguous()
    else:
        keys, values, present = layer.dequantize()
        dense_mask = _close_absent(attention_mask, present, query)
        output, weights = library_attention(module, query, keys, values, dense_mask, dropout, scaling, **kwargs)
    layer.observe(
        query,
        mask,
        module,
        scaling=scaling,
        lse=lse,
        softcap=kwargs.get("softcap"),
        position_ids=kwargs.get("position_ids"),
    )
    return output, weights


def library_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the model would do without tersor: SDPA, or its own eager function where SDPA lacks a feature."""
    kwargs.pop(STATE, None)
    if not any(_given(kwargs, name) for name in EAGER_ONLY):
        function = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return function(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        needed = [name for name in EAGER_ONLY if _given(kwargs, name)]
        raise NotImplementedError(
            f"{type(module).__name__} asks for {needed}, which SDPA lacks, and has no eager attention to fall back on; "
            "run this model without tersor"
        )
    mask = _additive(attention_mask, query, key.shape[2])
    return eager(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def _without_weights(kwargs: dict[str, Any]) -> None:
    """A sparse prefill never has the whole attention matrix."""
    if kwargs.pop("output_attentions", None):
        warnings.warn(
            "output_attentions: a sparse prefill computes no attention matrix, so it returns None", stacklevel=3
        )


def _given(kwargs: dict[str, Any], name: str) -> bool:
    return kwargs.get(name) is not None and kwargs[name] is not False


def _check(module: nn.Module, layer: CompressedLayer, query: Tensor, mask: Tensor | None) -> None:
    if module.training and query.requires_grad:
        raise RuntimeError(
            "a compressed cache has no gradient: call model.eval(), or train with use_cache=False and without the cache"
        )
    if mask is not None and mask.shape[-1] != layer.get_seq_length():
        raise ValueError(
            f"the attention mask covers {mask.shape[-1]} tokens but the cache holds {layer.get_seq_length()}; "
            "pass a mask for the whole sequence, cached tokens included"
        )


def _fusable(mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> bool:
    plain_mask = mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)
    return plain_mask and dropout == 0.0 and not any(_given(kwargs, name) for name in UNFUSED)


def _additive(mask: Tensor | None, query: Tensor, columns: int) -> Tensor | None:
    """The mask as eager attention functions want it: 0 where open, the lowest number where closed."""
    if mask is None and query.shape[2] > 1:
        mask = causal_rows(query.shape[2], columns, query.device)[:, None]
    if mask is None or mask.dtype != torch.bool:
        return mask
    closed = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, closed)


def _close_absent(mask: Tensor | None, present: Tensor, query: Tensor) -> Tensor | None:
    """Close the tokens that are not stored (``present`` is bool ``[batch, kv_heads, sequence]``)."""
    if bool(present.all()):
        return mask
    groups = query.shape[1] // present.shape[1]
    stored = present.repeat_interleave(groups, dim=1)[:, :, None, :]
    if mask is None:
        return stored & causal_rows(query.shape[2], present.shape[-1], query.device)[:, None]
    if mask.dtype == torch.bool:
        return mask & stored
    return mask.masked_fill(~stored, torch.finfo(mask.dtype).min)


def register() -> None:
    """Make ``tersor`` known to transformers; the mask function keeps left padding closed."""
    AttentionInterface.register(ATTENTION_NAME, tersor_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


register()

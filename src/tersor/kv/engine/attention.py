"""The attention function ``tersor`` and its mask function, registered with transformers once.

For a tagged key (see `tersor.kv.engine.layer`) it computes attention over segments and buffer and reports the
queries to the layer; every other call goes to the library's own implementation untouched.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from tersor.kv.engine.call import EAGER_ONLY, AttentionCall, causal_rows
from tersor.kv.engine.layer import ATTENTION_NAME, TAG, CompressedLayer
from tersor.kv.engine.state import STATE, ForwardState
from tersor.lowbit.kernels import get_kernel

#: Keywords that the packed kernel does not implement.
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
        RuntimeError: When a compressed cache is used while training, since compression has no gradient.
        ValueError: When the mask does not cover the cached sequence.
    """
    layer: CompressedLayer | None = getattr(key, TAG, None)
    state: ForwardState | None = kwargs.pop(STATE, None)
    if state is not None or (layer is not None and layer.choices.prefill.sparse):
        _without_weights(kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = AttentionCall(module, query, key, value, attention_mask, scaling, dropout, kwargs, layer, state)
    if layer is None:
        if state is not None and state.covers(module, kwargs):
            return state.choices.prefill.attend(call)
        return call.dense()
    _check(call, layer)
    lse = weights = None
    if not layer.segments:
        output, weights = layer.choices.prefill.attend(call)
    elif _fusable(call):
        kernel = get_kernel("packed_attention", device=query.device.type)
        output, lse = kernel(query, layer.parts(call), scaling=scaling)
        output = output.transpose(1, 2).to(query.dtype).contiguous()
    else:
        keys, values, present = layer.dequantize()
        output, weights = replace(call, key=keys, value=values, mask=_close_absent(call, present)).dense()
    layer.observe(call, lse)
    return output, weights


def _without_weights(options: dict[str, Any]) -> None:
    """A sparse prefill never has the whole attention matrix."""
    if options.pop("output_attentions", None):
        warnings.warn(
            "output_attentions: a sparse prefill computes no attention matrix, so it returns None", stacklevel=3
        )


def _check(call: AttentionCall, layer: CompressedLayer) -> None:
    if call.module.training and call.query.requires_grad:
        raise RuntimeError(
            "a compressed cache has no gradient: call model.eval(), or train with use_cache=False and without the cache"
        )
    if call.mask is not None and call.mask.shape[-1] != layer.get_seq_length():
        raise ValueError(
            f"the attention mask covers {call.mask.shape[-1]} tokens but the cache holds {layer.get_seq_length()}; "
            "pass a mask for the whole sequence, cached tokens included"
        )


def _fusable(call: AttentionCall) -> bool:
    """Whether the packed kernel can compute the call."""
    plain_mask = call.mask is None or (call.mask.dtype == torch.bool and call.mask.shape[1] == 1)
    return plain_mask and call.dropout == 0.0 and not call.given(*UNFUSED)


def _close_absent(call: AttentionCall, present: Tensor) -> Tensor | None:
    """The mask without the tokens that are not stored (``present`` is bool ``[batch, kv_heads, sequence]``)."""
    mask, query = call.mask, call.query
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

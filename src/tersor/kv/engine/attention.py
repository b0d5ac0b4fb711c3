"""The attention function ``tersor`` and its mask function, registered with transformers once.

For a tagged key (see `tersor.kv.engine.layer`) it computes attention over segments and buffer and reports the
queries to the layer; every other call goes to the library's own implementation untouched.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

from tersor._errors import TersorError, UnsupportedError
from tersor.kv.engine.call import ATTENTION_NAME, EAGER_ATTENTION_NAME, AttentionCall
from tersor.kv.engine.layer import TAG, CompressedLayer
from tersor.kv.engine.state import STATE, ForwardState

#: Keyword of calls under `EAGER_ATTENTION_NAME`.
OWN = "tersor_own_attention"
#: Keywords that SDPA takes and the packed kernel does not.
UNFUSED = ("position_bias", "sliding_window")


@torch.compiler.disable
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
        NotImplementedError: When the model changes keys or values between its cache and its attention.
    """
    layer: CompressedLayer | None = getattr(key, TAG, None)
    if layer is not getattr(value, TAG, None):
        changed = "keys" if layer is None else "values"
        raise UnsupportedError(
            f"{type(module).__name__} changes its {changed} after the cache has returned them, so what is stored is "
            "not what it attends to; use the library's own cache for this model"
        )
    state: ForwardState | None = kwargs.pop(STATE, None)
    if state is not None or (layer is not None and layer.choices.prefill.sparse):
        _without_weights(kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    own = kwargs.pop(OWN, False)
    call = AttentionCall(module, query, key, value, attention_mask, scaling, dropout, kwargs, layer, state, own)
    if layer is None:
        if state is not None and state.covers(module, kwargs):
            return state.choices.prefill.attend(call)
        return call.dense()
    _check(call, layer)
    lse = weights = None
    if not layer.segments or state is not None:
        output, weights = layer.choices.prefill.attend(call)
    elif _fusable(call):
        output, lse = layer.attend(call)
        output = output.transpose(1, 2).to(query.dtype).contiguous()
    else:
        output, weights = call.over_stored().dense()
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
    if call.mask is None or call.mask.shape[-1] == layer.get_seq_length():
        return
    of_its_own = call.mask.shape[1] > 1 or call.mask.dtype != torch.bool
    if of_its_own and call.mask.shape[-1] == call.key.shape[2]:
        raise UnsupportedError(
            f"{type(call.module).__name__} makes its mask from the values that the cache returns, and compressed "
            "tokens are not among them; use the library's own cache for this model"
        )
    raise TersorError(
        f"the attention mask covers {call.mask.shape[-1]} tokens but the cache holds {layer.get_seq_length()}; "
        "pass a mask for the whole sequence, cached tokens included"
    )


def _fusable(call: AttentionCall) -> bool:
    """Whether the packed kernel can compute the call."""
    plain_mask = call.mask is None or (call.mask.dtype == torch.bool and call.mask.shape[1] == 1)
    return plain_mask and call.dropout == 0.0 and not call.beyond_sdpa and not call.given(*UNFUSED)


def register() -> None:
    """Make tersor's attention known to transformers; the mask functions keep left padding closed."""
    AttentionInterface.register(ATTENTION_NAME, tersor_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    AttentionInterface.register(EAGER_ATTENTION_NAME, partial(tersor_attention, **{OWN: True}))
    AttentionMaskInterface.register(EAGER_ATTENTION_NAME, eager_mask)


register()

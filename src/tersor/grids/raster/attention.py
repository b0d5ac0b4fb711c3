"""Attention of a pass: several queries under a mask, where groups of query heads share keys and values.

The library copies keys and values once for each query head as soon as there is a mask. In a pass of several tokens
there always is one, and over thousands of cached tokens the copies take longer than the attention. Here the queries of
a group stand side by side as rows of one problem instead; the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "tersor_grouped"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """For transformers' `AttentionInterface`; shapes and return value are the library's.

    ``query``: ``[batch, heads, queries, dim]``. ``key``, ``value``: ``[batch, kv_heads, tokens, dim]``.
    ``attention_mask``: ``[batch or 1, 1, queries, tokens]``, bool or additive; other masks, and attention without one
    or without groups, are left to the library.
    """
    batch, heads, queries, dim = query.shape
    kv_heads = key.shape[1]
    if attention_mask is None or attention_mask.shape[1] != 1 or heads == kv_heads:
        function = ALL_ATTENTION_FUNCTIONS["sdpa"]
        output: tuple[Tensor, None] = function(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    group = heads // kv_heads
    rows = query.reshape(batch, kv_heads, group * queries, dim)
    mask = attention_mask[..., : key.shape[2]].repeat(1, 1, group, 1)
    found = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return found.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def grouped(model: Any) -> Iterator[None]:
    """Within it, ``model`` attends by `grouped_attention` where it would have used SDPA; then as before."""
    config = model.config
    text = config.get_text_config(decoder=True)
    key = next((key for key in config.sub_configs if getattr(config, key, None) is text), None)
    takes_part = getattr(model, "_supports_attention_backend", False) and (text is config or key is not None)
    if not takes_part or getattr(text, "_attn_implementation", None) != "sdpa":
        yield
        return
    model.set_attn_implementation(NAME if key is None else {key: NAME})
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa" if key is None else {key: "sdpa"})

"""Attention of a pass: several queries under a mask, where groups of query heads share keys and values.

The library copies keys and values once for each query head as soon as there is a mask. In a pass of several tokens
there always is one, and over thousands of cached tokens the copies take longer than the attention. Here the queries of
a group stand side by side as rows of one problem instead; the numbers are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tersor._compat import choose_attention

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


def with_grouped_attention(model: Any) -> Any:
    """``model`` as one run sees it: it attends by `grouped_attention` where the model would use SDPA.

    The model itself stays as it is, so that other calls may use it meanwhile.

    Args:
        model: A model of transformers.

    Returns:
        A view with the model's own weights; the model itself where no query heads share keys and values.
    """
    text = model.config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    shared = getattr(text, "num_key_value_heads", heads) != heads
    takes_part = getattr(model, "_supports_attention_backend", False)
    if not shared or not takes_part or getattr(text, "_attn_implementation", None) != "sdpa":
        return model
    own = copy.copy(text)
    choose_attention(own, NAME)
    return view(model, lambda module: {"config": own} if getattr(module, "config", None) is text else {})


def view(module: nn.Module, changes: Callable[[nn.Module], dict[str, Any]]) -> nn.Module:
    """A module with other attributes, which shares its weights, its hooks and all parts in which nothing differs.

    Args:
        module: Stays as it is. A part whose ``forward`` something has replaced keeps calling the original.
        changes: The attributes that differ, of each part.
    """
    parts = {name: None if part is None else view(part, changes) for name, part in module._modules.items()}
    changed = changes(module)
    if not changed and all(part is module._modules[name] for name, part in parts.items()):
        return module
    found = copy.copy(module)
    found.__dict__ |= {"_modules": parts, "_buffers": {**module._buffers}}
    for name, value in changed.items():
        setattr(found, name, value)
    return found

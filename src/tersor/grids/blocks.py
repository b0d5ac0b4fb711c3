"""Parts that raster and NAR models share, named as in LlamaGen's checkpoints (arXiv 2406.06525)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tersor.grids.rotary import Rotation, turn

#: Attention heads by width, for the published sizes: the weights alone do not tell.
PUBLISHED_HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 3200: 32, 4096: 32}


class Widths:
    """What follows from a configuration's sizes."""

    hidden_size: int
    num_attention_heads: int

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        """The SwiGLU's width: two thirds of four times the hidden size, rounded up to a multiple of 256."""
        return 256 * -(-int(8 * self.hidden_size / 3) // 256)


def unscaled_norm(x: Tensor, eps: float) -> Tensor:
    """RMS norm of ``[..., width]`` in float32, rounded to the type of ``x``."""
    if x.dtype == torch.float32:  # nothing is to be rounded on the way
        return F.rms_norm(x, x.shape[-1:], None, eps)
    exact = x.float()
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).type_as(x)


class Norm(nn.Module):
    """RMS norm in float32, rounded before it is scaled."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Norm of ``[..., width]``."""
        return unscaled_norm(x, self.eps) * self.weight


class Attention(nn.Module):
    """Attention with grouped heads, whose queries and keys are turned.

    Args:
        config: Sizes.
        layer: Number of the block, for the cache.
        causal: Whether several tokens without a mask see each other in order; otherwise they see all that there is.
    """

    def __init__(self, config: Any, layer: int, *, causal: bool) -> None:
        super().__init__()
        self.layer, self.head_dim, self.causal = layer, config.head_dim, causal
        self.heads = config.num_attention_heads
        self.key_heads = config.num_key_value_heads or self.heads
        self.wqkv = nn.Linear(config.hidden_size, (self.heads + 2 * self.key_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Tensor | None, cache: Any) -> Tensor:
        """Mix tokens ``[batch, tokens, width]``."""
        batch, tokens, _ = x.shape
        both = self.heads + self.key_heads
        mixed = self.wqkv(x).view(batch, tokens, both + self.key_heads, self.head_dim)
        # Tokens stay before heads: so the output of attention is merged again without a copy.
        qk, v = mixed[:, :, :both], mixed[:, :, both:].transpose(1, 2)
        if rotation is not None:
            qk = turn(qk, rotation)
        q, k = qk[:, :, : self.heads].transpose(1, 2), qk[:, :, self.heads :].transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        causal, grouped = self.causal and mask is None and tokens > 1, self.heads != self.key_heads
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        merged: Tensor = self.wo(out.transpose(1, 2).reshape(batch, tokens, -1))
        return merged


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of tokens ``[batch, tokens, width]``."""
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Block(GradientCheckpointingLayer):  # type: ignore[misc]
    """Attention and feed-forward, each on the norm of what is added up.

    Args:
        config: Sizes, and ``residual_dropout`` and ``ffn_dropout`` if there are any.
        layer: See `Attention`.
        causal: See `Attention`.
    """

    def __init__(self, config: Any, layer: int, *, causal: bool) -> None:
        super().__init__()
        self.attention = Attention(config, layer, causal=causal)
        self.feed_forward = FeedForward(config)
        self.attention_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.residual_dropout = nn.Dropout(getattr(config, "residual_dropout", 0.0))
        self.ffn_dropout = nn.Dropout(getattr(config, "ffn_dropout", 0.0))

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Tensor | None, cache: Any) -> Tensor:
        """Of tokens ``[batch, tokens, width]``."""
        mixed: Tensor = self.attention(self.attention_norm(x), rotation, mask, cache)
        if not self.training:  # even a dropout that does nothing takes its time in a pass of one token
            x = x + mixed
            fed: Tensor = self.feed_forward(self.ffn_norm(x))
            return x + fed
        x = x + self.residual_dropout(mixed)
        fed = self.ffn_dropout(self.feed_forward(self.ffn_norm(x)))
        return x + fed

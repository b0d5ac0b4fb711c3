"""Parts that raster and NAR models share, named as in LlamaGen's checkpoints (arXiv 2406.06525)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tersor._errors import TersorError
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


def as_classes(given: Any, num_classes: int) -> Tensor:
    """Classes as a tensor ``[batch]`` of whole numbers, from one or from numbers in any sequence.

    Args:
        given: The classes.
        num_classes: How many there are; the null class is not among them.

    Raises:
        TersorError: If there are none, or one is no class.
    """
    try:
        labels = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        labels = torch.empty(0)
    whole = not labels.is_floating_point() and labels.dtype != torch.bool and labels.ndim == 1 and len(labels) > 0
    # Not looked at under torch.compile: a data-dependent branch breaks the graph.
    if not whole or not (torch.compiler.is_compiling() or bool(((labels >= 0) & (labels < num_classes)).all())):
        raise TersorError(
            f"class_labels={_brief(given)} must be [batch]: whole numbers from 0 to {num_classes - 1}, at least one; "
            "the null class is for guidance"
        )
    return labels.long()


def _brief(given: Any) -> str:
    text = str(given.tolist() if isinstance(given, Tensor) else given)
    return text if len(text) <= 60 else f"{text[:60]}..."


class ClassEmbedding(nn.Module):
    """A vector for each class."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        # The last row is the null class.
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.hidden_size)

    def prefix(self, labels: Tensor, *, guided: bool, dropped: Tensor | None) -> tuple[Tensor, Tensor]:
        """One token a sample, ``[rows, 1, width]``, and which of them are no padding: all.

        Args:
            labels: Classes, ``[batch]``.
            guided: Append the null class for each sample, as further rows.
            dropped: Bool ``[batch]``, samples that get the null class instead of their own.
        """
        null = torch.full_like(labels, self.embedding_table.num_embeddings - 1)
        labels = labels if dropped is None else torch.where(dropped, null, labels)
        labels = torch.cat([labels, null]) if guided else labels
        embeddings: Tensor = self.embedding_table(labels)[:, None]
        return embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)


class CaptionProjection(nn.Module):
    """From text features to the model's width."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.caption_size, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of features ``[batch, tokens, caption_size]``."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class CaptionEmbedding(nn.Module):
    """Text features and those of the null condition."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(config)
        self.uncond_embedding = nn.Parameter(torch.zeros(config.condition_tokens, config.caption_size))

    def init_null(self) -> None:
        """Draw the null condition, of the power of normed features."""
        nn.init.normal_(self.uncond_embedding, std=self.uncond_embedding.shape[-1] ** -0.5)

    def prefix(self, features: Tensor, valid: Tensor, *, guided: bool, dropped: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings ``[rows, condition_tokens, width]``, and which of them are no padding (bool).

        Args:
            features: ``[batch, condition_tokens, caption_size]``, padded on the left.
            valid: Bool ``[batch, condition_tokens]``, False for padding.
            guided: Append the null condition for each sample, as further rows.
            dropped: Bool ``[batch]``, samples that get the null condition instead of their own.
        """
        null = self.uncond_embedding.type_as(features).expand_as(features)
        features = features if dropped is None else torch.where(dropped[:, None, None], null, features)
        if guided:
            # The authors' code masks the null condition like the text beside it.
            features, valid = torch.cat([features, null]), torch.cat([valid, valid])
        return self.cap_proj(features.to(self.uncond_embedding.dtype)), valid

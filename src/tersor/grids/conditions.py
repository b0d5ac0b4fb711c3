"""What images are conditioned on: a class, or the features of a text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor._errors import TersorError


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


def class_names(config: Any) -> list[str]:
    """Names of a model's classes, by number; none where its configuration has none.

    Args:
        config: With ``num_classes``, and with names in ``id2label``, as the library's classifiers have them.
    """
    named = config.id2label or {}
    names = [str(named.get(number, "")) for number in range(config.num_classes)]
    known = all(names) and names != [f"LABEL_{number}" for number in range(len(names))]
    return names if known else []


def class_numbers(given: Sequence[str], config: Any) -> list[int]:
    """Classes by their names or numbers.

    Where a name is a number itself, such as that of a folder, only names count: nothing means two classes.

    Args:
        given: Names or numbers, as text.
        config: See `class_names`.

    Raises:
        TersorError: If one is no class.
    """
    names = class_names(config)
    known = {name: number for number, name in enumerate(names)}
    if not any(name.isdecimal() for name in names):
        known |= {str(number): number for number in range(config.num_classes)}
    if unknown := [text for text in given if text not in known]:
        shown = ", ".join(names[:8]) + (", and so on" if len(names) > 8 else "")
        last = config.num_classes - 1
        raise TersorError(f"{unknown[0]!r} is no class of this model; it has {shown or f'0 to {last}'}")
    return [known[text] for text in given]


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

    def prefix(
        self, features: Tensor, mask: Tensor | None, *, guided: bool, dropped: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings ``[rows, condition_tokens, width]``, and which of them are no padding (bool).

        Args:
            features: ``[batch, tokens, caption_size]`` of any dtype; see `fit_text`.
            mask: ``[batch, tokens]``, 0 for padding; None is no padding. A text without tokens is the null condition.
            guided: Append the null condition for each sample, as further rows.
            dropped: Bool ``[batch]``, samples that get the null condition instead of their own.

        Raises:
            TersorError: See `fit_text`.
        """
        features, valid = fit_text(features, mask, *self.uncond_embedding.shape)
        features = features.to(self.uncond_embedding.dtype)
        empty = ~valid.any(-1)
        valid, dropped = valid | empty[:, None], empty if dropped is None else empty | dropped
        null = self.uncond_embedding.expand_as(features)
        features = torch.where(dropped[:, None, None], null, features)
        if guided:
            # The authors' code masks the null condition like the text beside it.
            features, valid = torch.cat([features, null]), torch.cat([valid, valid])
        return self.cap_proj(features), valid


def fit_text(features: Tensor, mask: Tensor | None, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Features and bool mask of exactly so many tokens: shorter ones are padded, longer texts cut with a warning.

    Args:
        features: ``[batch, any, width]``, padded on the left.
        mask: ``[batch, any]``, 0 for padding; None is no padding.
        tokens: How many there will be.
        width: Of the features.

    Returns:
        ``[batch, tokens, width]`` and ``[batch, tokens]``.

    Raises:
        TersorError: If there are none, they have another shape, or padding is not on the left.
    """
    if not isinstance(features, Tensor) or features.ndim != 3 or features.shape[-1] != width or not len(features):
        given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise TersorError(f"text_features must be [batch, tokens, {width}], at least one; got {given}")
    valid = torch.ones(features.shape[:2], device=features.device) if mask is None else mask
    if valid.shape != features.shape[:2]:
        raise TersorError(
            f"text_mask must be {tuple(features.shape[:2])}, like text_features; got {tuple(valid.shape)}"
        )
    valid = valid.bool()
    if not torch.compiler.is_compiling() and bool((valid[:, 1:] < valid[:, :-1]).any()):
        raise TersorError("text_features are padded on the right or have holes; pad on the left")
    short = max(0, tokens - features.shape[1])
    features, valid = F.pad(features, (0, 0, short, 0)), F.pad(valid, (short, 0))
    length, counts = valid.shape[1], valid.sum(-1)
    if not torch.compiler.is_compiling() and bool((counts > tokens).any()):
        warnings.warn(f"a text of {int(counts.max())} tokens is cut to {tokens}, condition_tokens", stacklevel=5)
    # The beginning of a text that is too long; the end of the padding before one that is not.
    start = torch.minimum(length - counts, torch.full_like(counts, length - tokens))
    index = start[:, None] + torch.arange(tokens, device=features.device)
    return features.gather(1, index[..., None].expand(-1, -1, width)), valid.gather(1, index)

"""Merging the keys or values of two neighbouring layers (MiniCache, arXiv 2405.14366).

``x1`` and ``x2`` are the tensors ``[batch, kv_heads, tokens, head_dim]`` of the earlier and the later layer. A
*unit* is what has a length and a direction: the vector of one head, or with granularity "token" all heads of a token
side by side. ``Omega`` is the angle between the two layers' directions of a unit, ``distance = Omega / pi``.
All arithmetic is float32 (float64 for float64 input).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tersor.lowbit.codes import compute_dtype

Granularity = Literal["head", "token"]
Retention = Literal["range", "quantile"]
Merge = Literal["slerp", "mean"]

#: Below this sine two directions are interpolated on the chord, or are opposite ones and have no direction between.
SMALL_SINE = 1e-4


@dataclass
class MergedPair:
    """One direction for two layers, and each layer's length of it.

    ``scopes`` below is the number of KV heads, or 1 with granularity "token".

    Args:
        directions: ``[batch, kv_heads, tokens, head_dim]`` in compute precision, of length 1 per unit (0 where both
            layers are zero).
        lengths: Lengths in the earlier and in the later layer, each ``[batch, scopes, tokens]``.
        distance: ``Omega / pi`` between 0 and 1, ``[batch, scopes, tokens]``.
        undefined: True where the layers point in opposite directions, bool ``[batch, scopes, tokens]``.
        errors: ``|x_hat - x| / |x|`` in either layer by the laws below, each ``[batch, scopes, tokens]``.
    """

    directions: Tensor
    lengths: list[Tensor]
    distance: Tensor
    undefined: Tensor
    errors: tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class MergeRule:
    """How two layers are merged, and which of their tokens are not.

    Args:
        t: Where the shared direction lies: 0 keeps the earlier layer's, 1 the later one's.
        gamma: How much stays unmerged, see `retained`.
        retention: Rule for what stays unmerged, see `retained`.
        max_retained_fraction: Largest share of tokens that the rule "range" retains.
        granularity: One length a "head", or one a "token".
        merge: "slerp" (the paper), or "mean" to compare with.
    """

    t: float = 0.6
    gamma: float = 0.05
    retention: Retention = "range"
    max_retained_fraction: float = 0.1
    granularity: Granularity = "head"
    merge: Merge = "slerp"

    def pair(self, x1: Tensor, x2: Tensor) -> MergedPair:
        """Merge the keys or the values of two layers."""
        return merge_pair(x1, x2, self.t, granularity=self.granularity, merge=self.merge)

    def apart(self, pairs: Sequence[MergedPair], valid: Tensor | None) -> Tensor:
        """Tokens that are not merged, bool ``[batch, tokens]``: see `retained`, over all heads, keys and values."""
        return retained(
            torch.stack([pair.distance.amax(1) for pair in pairs]).amax(0),
            gamma=self.gamma,
            rule=self.retention,
            valid=valid,
            undefined=torch.stack([pair.undefined.any(1) for pair in pairs]).any(0),
            max_fraction=self.max_retained_fraction,
        )


def merge_pair(
    x1: Tensor, x2: Tensor, t: float, *, granularity: Granularity = "head", merge: Merge = "slerp"
) -> MergedPair:
    """Split both layers into length and direction and merge the directions (the paper's merging).

    ``t=0`` is the direction of ``x1`` and ``t=1`` that of ``x2``. A zero vector takes the other layer's direction.
    ``merge="mean"`` is the plain average of the two layers, with the same length in both: what the paper improves on.
    """
    heads, dim = x1.shape[1], x1.shape[-1]
    x1, x2 = as_units(x1, granularity), as_units(x2, granularity)
    (m1, u1), (m2, u2) = length_and_direction(x1), length_and_direction(x2)
    u1, u2 = torch.where(m1[..., None] == 0, u2, u1), torch.where(m2[..., None] == 0, u1, u2)
    distance = angle(u1, u2) / math.pi
    undefined = distance > 1 - SMALL_SINE / math.pi
    if merge == "mean":
        length, direction = length_and_direction((x1 + x2) / 2)
        lengths, errors = [length, length], mean_relative_errors(distance, m1, m2)
    else:
        direction, lengths, errors = slerp(u1, u2, t), [m1, m2], relative_errors(distance, t)
    return MergedPair(as_heads(direction, heads, dim), lengths, distance, undefined, errors)


def restore(directions: Tensor, lengths: Tensor) -> Tensor:
    """``x_hat = m e`` (the paper's restoration): ``[batch, kv_heads, tokens, head_dim]`` from `MergedPair`'s parts."""
    return directions * lengths[..., None]


def as_units(x: Tensor, granularity: Granularity) -> Tensor:
    """``[batch, kv_heads, tokens, head_dim]``, or for "token" ``[batch, 1, tokens, kv_heads * head_dim]``."""
    x = x.to(compute_dtype(x.dtype))
    return x.transpose(1, 2).flatten(2)[:, None] if granularity == "token" else x


def as_heads(units: Tensor, heads: int, dim: int) -> Tensor:
    """The inverse of `as_units`."""
    return units if units.shape[-1] == dim else units[:, 0].unflatten(2, (heads, dim)).transpose(1, 2)


def length_and_direction(x: Tensor) -> tuple[Tensor, Tensor]:
    """``|x|`` ``[...]`` and ``x / |x|`` ``[..., dim]`` over the last axis; the direction of a zero vector is zero."""
    # Divided by its largest number first, so that no square overflows.
    largest = x.abs().amax(-1, keepdim=True)
    scaled = x / torch.where(largest == 0, 1.0, largest)
    norm = scaled.norm(dim=-1, keepdim=True)
    return (largest * norm)[..., 0], scaled / torch.where(norm == 0, 1.0, norm)


def angle(u1: Tensor, u2: Tensor) -> Tensor:
    """``Omega`` between unit vectors; 0 between zero vectors.

    The arc cosine of a product loses half the digits at small angles; this form (Kahan's) loses none.
    """
    return 2 * torch.atan2((u1 - u2).norm(dim=-1), (u1 + u2).norm(dim=-1))


def slerp(u1: Tensor, u2: Tensor, t: float) -> Tensor:
    """Spherical interpolation ``[sin((1-t) Omega) u1 + sin(t Omega) u2] / sin(Omega)`` of unit vectors.

    Nearly equal directions are interpolated on the chord. Opposite ones have no direction between them: what comes
    back there is finite, and means nothing.
    """
    omega = angle(u1, u2)[..., None]
    sine = omega.sin()
    small = sine < SMALL_SINE
    safe = torch.where(small, 1.0, sine)
    first = torch.where(small, 1 - t, ((1 - t) * omega).sin() / safe)
    second = torch.where(small, t, (t * omega).sin() / safe)
    return length_and_direction(first * u1 + second * u2)[1]


def retained(
    distance: Tensor,
    *,
    gamma: float,
    rule: Retention = "range",
    valid: Tensor | None = None,
    undefined: Tensor | None = None,
    max_fraction: float = 1.0,
) -> Tensor:
    """Tokens too different to merge, bool ``[batch, tokens]``, sample by sample (the paper's retention).

    ``"range"``: ``d > d_max - gamma (d_max - d_min)``, and of these the most distant ``max_fraction`` of all tokens.
    (The paper prints ``d < d_min + gamma (d_max - d_min)``: right if ``d`` is read as a similarity.)
    ``"quantile"``: the ``ceil(gamma n)`` most distant of ``n`` tokens. With either, ``gamma=1`` retains everything,
    and ``undefined`` tokens are always retained, on top of any limit. Of equal distances the earlier token is kept.

    Args:
        distance: ``Omega / pi``, ``[batch, tokens]``.
        gamma: Share of the range of distances, or of the tokens.
        rule: ``"range"`` or ``"quantile"``.
        valid: False for tokens that are neither counted nor retained, bool ``[batch, tokens]``; None without any.
        undefined: Tokens without a direction between the layers, bool ``[batch, tokens]``, or None.
        max_fraction: Largest share of the tokens that ``"range"`` retains.
    """
    valid = torch.ones_like(distance, dtype=torch.bool) if valid is None else valid
    if gamma == 1.0:
        return valid
    count = valid.sum(-1, keepdim=True)
    if rule == "quantile":
        # Rounded first: 0.07 * 100 is a little more than 7 and must not become 8.
        limit = (gamma * count.double()).round(decimals=9).ceil()
        far = valid
    else:
        limit = (max_fraction * count.double()).round(decimals=9).floor()
        lowest = distance.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
        highest = distance.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
        far = valid & (distance > highest - gamma * (highest - lowest))
    order = distance.masked_fill(~far, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    chosen = far & (rank < limit)
    return chosen if undefined is None else chosen | (undefined & valid)


def relative_errors(distance: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """``|x_hat - x| / |x|`` of the earlier and of the later layer when merged by `slerp`.

    The direction moves by ``t Omega`` and by ``(1-t) Omega`` and lengths are exact, so the errors are the chords
    ``2 sin(t Omega / 2)`` and ``2 sin((1-t) Omega / 2)``, with equality for every unit.
    """
    omega = distance * math.pi
    return 2 * (t * omega / 2).sin(), 2 * ((1 - t) * omega / 2).sin()


def mean_relative_errors(distance: Tensor, m1: Tensor, m2: Tensor) -> tuple[Tensor, Tensor]:
    """The same for the plain average: ``|x2 - x1| / 2`` over each layer's length (law of cosines)."""
    half = (m1**2 + m2**2 - 2 * m1 * m2 * (distance * math.pi).cos()).clamp_min(0.0).sqrt() / 2
    return half / torch.where(m1 == 0, 1.0, m1), half / torch.where(m2 == 0, 1.0, m2)

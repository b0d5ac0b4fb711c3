"""Rotary angles by the coordinates of a grid's cells, for raster and NAR models alike."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def rotary_widths(head_dim: int, axes: int) -> list[int]:
    """Channels of a head that turn with each axis: even numbers, as equal as can be, the larger ones last."""
    pairs, rest = divmod(head_dim // 2, axes)
    return [2 * (pairs + (axis >= axes - rest)) for axis in range(axes)]


def rotary_table(places: Tensor, grid_size: tuple[int, ...], head_dim: int, prefix: int, theta: float) -> Tensor:
    """Cosine and sine by place in the sequence, ``[1, tokens, head_dim // 2, 2]``, float32; zeros for the prefix."""
    offset = (places - prefix).clamp_min(0)
    stride, angles = math.prod(grid_size), []
    for size, width in zip(grid_size, rotary_widths(head_dim, len(grid_size)), strict=True):
        stride //= size
        powers = torch.arange(0, width, 2, device=places.device, dtype=torch.float32) / width
        angles.append((offset // stride % size).float()[:, None] * theta**-powers)
    turned = torch.cat(angles, dim=-1)
    table = torch.stack([turned.cos(), turned.sin()], dim=-1)
    return (table * (places >= prefix)[:, None, None])[None]


#: Factors of `turn`, each ``[..., tokens, 1, head_dim]`` in float32.
Rotation = tuple[Tensor, Tensor]


def turn(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn neighbouring channels of ``[batch, tokens, heads, head_dim]``: (a, b) to (a cos - b sin, b cos + a sin)."""
    cosine, sine = rotation
    exact = x.float()
    swapped = exact.view(*exact.shape[:-1], -1, 2).flip(-1).flatten(-2)
    return torch.addcmul(exact * cosine, swapped, sine).type_as(x)


def rotation_of(grid_size: tuple[int, ...], head_dim: int, prefix: int, theta: float, device: torch.device) -> Rotation:
    """`rotary_table` of the prefix and every cell, as `turn` takes it."""
    places = torch.arange(prefix + math.prod(grid_size), device=device)
    cosine, sine = rotary_table(places, grid_size, head_dim, prefix, theta)[0].unbind(-1)
    return cosine.repeat_interleave(2, -1)[:, None], torch.stack([-sine, sine], dim=-1).flatten(-2)[:, None]


@lru_cache(maxsize=16)
def kept_rotation(*arguments: Any) -> Rotation:
    """`rotation_of`, made once, since each pass asks."""
    # Whoever asks first may do so in inference mode; training must be able to use the table too.
    with torch.inference_mode(False):
        return rotation_of(*arguments)

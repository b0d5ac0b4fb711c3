"""Rotary angles by the coordinates of a grid's cells, for raster and NAR models alike."""

from __future__ import annotations

import math
from functools import lru_cache

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


@lru_cache(maxsize=16)
def kept_table(grid_size: tuple[int, ...], head_dim: int, prefix: int, theta: float, device: torch.device) -> Tensor:
    """`rotary_table` of the prefix and every cell, ``[places, head_dim // 2, 2]``; made once, since each pass asks."""
    # Whoever asks first may do so in inference mode; training must be able to use the table too.
    with torch.inference_mode(False):
        places = torch.arange(prefix + math.prod(grid_size), device=device)
        return rotary_table(places, grid_size, head_dim, prefix, theta)[0]

"""Bit packing along the last axis, half-split.

With ``p = 8 / bits`` codes in a byte, byte ``j`` of a row of ``dim`` channels holds channels ``j``,
``j + w``, ``j + 2w``, ... (``w = dim / p``), lowest bits first. Unpacking therefore yields contiguous
channel ranges and needs no interleaving, neither in SIMD registers nor in Triton tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

PACKED_BITS = (2, 4, 8)


def check_bits(bits: int) -> None:
    """Raise `ValueError` unless ``bits`` has a packed layout (2, 4 or 8)."""
    if bits not in PACKED_BITS:
        raise ValueError(f"bits={bits!r} has no packed layout; choose one of {PACKED_BITS}")


def packed_width(dim: int, bits: int) -> int:
    """Bytes that a row of ``dim`` codes takes; the last byte is padded where ``dim`` does not fill it."""
    per_byte = 8 // bits
    return -(-dim // per_byte)


def pack_half_split(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes ``[..., dim]`` (uint8, each below ``2**bits``) to ``[..., packed_width]`` uint8.

    A ``dim`` that does not fill its last bytes is padded with zero codes.

    Raises:
        ValueError: for a bit width without a packed layout.
        TypeError: for codes that are not uint8.
    """
    check_bits(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}; clamp and cast them first")
    if bits == 8:
        return codes.contiguous()
    per_byte = 8 // bits
    width = packed_width(codes.shape[-1], bits)
    codes = torch.nn.functional.pad(codes, (0, width * per_byte - codes.shape[-1]))
    packed = codes[..., :width].clone()
    for slot in range(1, per_byte):
        packed |= codes[..., slot * width : (slot + 1) * width] << (slot * bits)
    return packed


def unpack_half_split(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Invert `pack_half_split`: ``[..., packed_width]`` uint8 to codes ``[..., dim]`` uint8.

    Raises:
        ValueError: for a bit width without a packed layout, or a width that does not belong to ``dim``.
    """
    check_bits(bits)
    if packed.shape[-1] != packed_width(dim, bits):
        raise ValueError(
            f"{dim} codes of {bits} bits take {packed_width(dim, bits)} bytes a row, got {packed.shape[-1]}"
        )
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    slots = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.cat(slots, dim=-1)[..., :dim]

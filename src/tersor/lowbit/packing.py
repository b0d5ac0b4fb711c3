"""Bit packing along the last axis, half-split.

With ``p = 8 / bits`` codes in a byte, byte ``j`` of a row of ``dim`` channels holds channels ``j``,
``j + w``, ``j + 2w``, ... (``w = dim / p``), lowest bits first. Unpacking therefore yields contiguous
channel ranges and needs no interleaving, neither in SIMD registers nor in Triton tiles.

Three bits do not divide a byte: a row is then a plane of the two low bits followed by a plane of the high bit,
each of them half-split (128 channels: 32 + 16 bytes).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor._errors import TersorError, WrongTypeError

#: Bits of a code -> its planes in a row, each as (bits of the plane, place of its lowest bit in the code).
PLANES: dict[int, tuple[tuple[int, int], ...]] = {
    1: ((1, 0),),
    2: ((2, 0),),
    3: ((2, 0), (1, 2)),
    4: ((4, 0),),
    8: ((8, 0),),
}
PACKED_BITS = tuple(PLANES)


def check_bits(bits: int) -> None:
    """Raise `ValueError` unless ``bits`` has a packed layout (1, 2, 3, 4 or 8)."""
    if bits not in PACKED_BITS:
        raise TersorError(f"bits={bits!r} has no packed layout; choose one of {PACKED_BITS}")


def plane_width(dim: int, plane_bits: int) -> int:
    """Bytes that a plane of ``dim`` codes takes; the last ones are padded where ``dim`` does not fill them."""
    return -(-dim // (8 // plane_bits))


def packed_width(dim: int, bits: int) -> int:
    """Bytes that a row of ``dim`` codes takes."""
    return sum(plane_width(dim, plane_bits) for plane_bits, _ in PLANES[bits])


def pack_half_split(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes ``[..., dim]`` (uint8, each below ``2**bits``) to ``[..., packed_width]`` uint8.

    A ``dim`` that does not fill its last bytes is padded with zero codes.

    Raises:
        ValueError: If the bit width has no packed layout.
        TypeError: If codes are not uint8.
    """
    check_bits(bits)
    if codes.dtype != torch.uint8:
        raise WrongTypeError(f"codes must be uint8, got {codes.dtype}; clamp and cast them first")
    if bits == 8:
        return codes.contiguous()
    planes = [_pack_plane((codes >> place) & ((1 << width) - 1), width) for width, place in PLANES[bits]]
    return planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)


def _pack_plane(codes: Tensor, plane_bits: int) -> Tensor:
    per_byte = 8 // plane_bits
    width = plane_width(codes.shape[-1], plane_bits)
    codes = torch.nn.functional.pad(codes, (0, width * per_byte - codes.shape[-1]))
    packed = codes[..., :width].clone()
    for slot in range(1, per_byte):
        packed |= codes[..., slot * width : (slot + 1) * width] << (slot * plane_bits)
    return packed


def unpack_half_split(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Invert `pack_half_split`: ``[..., packed_width]`` uint8 to codes ``[..., dim]`` uint8.

    Raises:
        ValueError: If the bit width has no packed layout, or the width does not belong to ``dim``.
    """
    check_bits(bits)
    if packed.shape[-1] != packed_width(dim, bits):
        raise TersorError(
            f"{dim} codes of {bits} bits take {packed_width(dim, bits)} bytes a row, got {packed.shape[-1]}"
        )
    if bits == 8:
        return packed
    codes, start = None, 0
    for plane_bits, place in PLANES[bits]:
        stop = start + plane_width(dim, plane_bits)
        plane = _unpack_plane(packed[..., start:stop], plane_bits, dim)
        codes = plane if codes is None else codes | plane << place
        start = stop
    assert codes is not None  # every width has a plane
    return codes


def _unpack_plane(packed: Tensor, plane_bits: int, dim: int) -> Tensor:
    mask = (1 << plane_bits) - 1
    slots = [(packed >> shift) & mask for shift in range(0, 8, plane_bits)]
    return torch.cat(slots, dim=-1)[..., :dim]

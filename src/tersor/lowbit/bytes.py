"""What a compressed cache costs: the published accounting, and the bytes that one segment really takes."""

from __future__ import annotations

from typing import Literal

from tersor._errors import TersorError
from tersor.lowbit.packing import packed_width

Scheme = Literal["groupwise", "tokenwise", "channel_separable", "mixed"]
PARAMETER_BITS = 16


def parameter_count(scheme: Scheme, *, batch: int, tokens: int, width: int, group_size: int = 32) -> int:
    """Numbers that a quantizer stores beside its codes, with parameters shared by the batch (paper, Table 1).

    Args:
        width: Key/value heads times head dimension (``hd`` of the paper).
        group_size: Channels in a group, for ``"groupwise"``.
    """
    counts = {
        # Minimum and step of every group, of keys and of values.
        "groupwise": 4 * batch * tokens * width // group_size,
        "tokenwise": 4 * batch * tokens,
        # Two per key channel, one scale per value channel, two per value token.
        "channel_separable": 3 * width + 2 * batch * tokens,
        # Salient and regular keys have parameters of their own.
        "mixed": 5 * width + 2 * batch * tokens,
    }
    if scheme not in counts:
        raise TersorError(f"scheme={scheme!r} is unknown; choose one of {sorted(counts)}")
    return counts[scheme]


def nominal_compression_ratio(
    scheme: Scheme, *, bits: float, batch: int, tokens: int, width: int, group_size: int = 32
) -> float:
    """Bits of a 16-bit cache over bits of codes and parameters, as the paper counts them.

    ``bits`` is the mean width of a code: ``ratio * high_bits + (1 - ratio) * low_bits`` for a mixed cache.
    """
    numbers = 2 * batch * tokens * width
    parameters = parameter_count(scheme, batch=batch, tokens=tokens, width=width, group_size=group_size)
    return 16 * numbers / (bits * numbers + PARAMETER_BITS * parameters)


def segment_bytes(
    groups: list[tuple[int, int]],
    *,
    batch: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    value_pairs_per_token: int = 1,
    position_sets: int = 1,
) -> int:
    """Bytes of one unpadded segment: codes, 16-bit parameters, channel scale and 32-bit positions.

    Args:
        groups: ``(tokens, bits)`` of each token group; empty groups cost nothing.
        value_pairs_per_token: 1, or ``kv_heads`` where every head has its own value parameters.
        position_sets: 1, or ``kv_heads`` where every head chose its own tokens.
    """
    total = 2 * batch * kv_heads * value_dim if any(tokens for tokens, _ in groups) else 0
    for tokens, bits in groups:
        if tokens == 0:
            continue
        row = packed_width(key_dim, bits) + packed_width(value_dim, bits)
        total += batch * kv_heads * tokens * row
        total += 2 * 2 * batch * kv_heads * key_dim
        total += 2 * 2 * batch * tokens * value_pairs_per_token
        total += 4 * batch * tokens * position_sets
    return total

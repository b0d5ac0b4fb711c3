"""Invariant 1: packing loses nothing, for any width and any memory layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.lowbit.packing import pack_half_split, packed_width, unpack_half_split


def codes(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)


def check_identity(pack, unpack, bits: int, original: torch.Tensor) -> None:
    packed = pack(original, bits)
    assert packed.shape[-1] == packed_width(original.shape[-1], bits)
    assert torch.equal(unpack(packed, bits, original.shape[-1]), original)


@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    dim=st.integers(1, 70),
    tokens=st.integers(0, 5),
    seed=st.integers(0, 2**31 - 1),
)
def test_unpack_inverts_pack(bits: int, dim: int, tokens: int, seed: int) -> None:
    check_identity(pack_half_split, unpack_half_split, bits, codes(bits, 2, tokens, dim, seed=seed))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_non_contiguous_input(bits: int) -> None:
    wide = codes(bits, 3, 40, 6)
    check_identity(pack_half_split, unpack_half_split, bits, wide.transpose(1, 2))
    check_identity(pack_half_split, unpack_half_split, bits, wide[..., ::2, :])


def unmasked_unpack(packed: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    return torch.cat([packed >> shift for shift in range(0, 8, bits)], -1)[..., :dim]


def interleaved_unpack(packed: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    slots = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(slots, -1).flatten(-2)[..., :dim]


@pytest.mark.parametrize("broken", [unmasked_unpack, interleaved_unpack])
def test_the_check_catches(broken) -> None:
    with pytest.raises(AssertionError):
        check_identity(pack_half_split, broken, 4, codes(4, 2, 3, 16))


def test_half_split_layout_is_the_documented_one() -> None:
    four = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    assert pack_half_split(four, 4).tolist() == [[1 | 3 << 4, 2 | 4 << 4]]
    two = torch.tensor([[0, 1, 2, 3, 3, 2, 1, 0]], dtype=torch.uint8)
    assert pack_half_split(two, 2).tolist() == [[0 | 2 << 2 | 3 << 4 | 1 << 6, 1 | 3 << 2 | 2 << 4 | 0 << 6]]


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one() -> None:
    three = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.uint8)
    low = pack_half_split(three & 3, 2)[0].tolist()
    assert pack_half_split(three, 3).tolist() == [[*low, 0b11110000]]
    assert packed_width(128, 3) == 32 + 16
    assert packed_width(7, 3) == 2 + 1


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of"):
        pack_half_split(codes(2, 1, 8), 5)
    with pytest.raises(TypeError, match="uint8"):
        pack_half_split(torch.zeros(1, 8), 4)
    with pytest.raises(ValueError, match="take 4 bytes a row, got 3"):
        unpack_half_split(torch.zeros(1, 3, dtype=torch.uint8), 4, 8)

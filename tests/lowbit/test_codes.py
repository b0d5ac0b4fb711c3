"""Affine codes read number by number, and precisions in which no range overflows."""

from __future__ import annotations

import pytest
import torch

from tersor.lowbit.codes import AffineCodes, compute_dtype, storage_dtype
from tersor.lowbit.packing import pack_half_split


def affine(bits: int, dtype: torch.dtype = torch.float32) -> tuple[AffineCodes, torch.Tensor]:
    """Codes of 5 tokens and 7 channels with a minimum a channel and a step a token, and the codes as they were."""
    generator = torch.Generator().manual_seed(bits)
    raw = torch.randint(0, 2**bits, (2, 5, 7), generator=generator, dtype=torch.uint8)
    minimum = torch.randn(2, 1, 7, generator=generator).to(dtype)
    step = torch.rand(2, 5, 1, generator=generator).to(dtype)
    return AffineCodes(pack_half_split(raw, bits), minimum, step, bits, 7), raw


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_each_number_is_its_code_times_the_step_above_the_minimum(bits: int, dtype: torch.dtype) -> None:
    codes, raw = affine(bits, dtype)
    decoded = codes.decode()
    assert decoded.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for place in ((0, 0, 0), (0, 4, 6), (1, 2, 3), (1, 3, 5)):
        sample, token, channel = place
        expected = int(raw[place]) * float(codes.step[sample, token, 0]) + float(codes.minimum[sample, 0, channel])
        assert float(decoded[place]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_some_tokens_are_unpacked_alone(bits: int) -> None:
    codes, raw = affine(bits)
    assert torch.equal(codes.unpack(), raw)
    assert torch.equal(codes.unpack(1, 4), raw[:, 1:4])
    assert torch.equal(codes.unpack(start=3), raw[:, 3:])


def test_low_precision_is_computed_in_float32() -> None:
    assert compute_dtype(torch.float64) == torch.float64
    assert {compute_dtype(each) for each in (torch.float32, torch.float16, torch.bfloat16)} == {torch.float32}


@pytest.mark.parametrize(
    ("wanted", "largest", "stored"),
    [
        (torch.float16, 65504.0 / 16, torch.float16),
        (torch.float16, 65520.0 / 16, torch.bfloat16),
        (torch.float16, float("inf"), torch.bfloat16),
        (torch.bfloat16, 1e9, torch.bfloat16),
        (torch.float32, 1e9, torch.float32),
    ],
)
def test_a_range_near_the_end_of_float16_is_stored_in_bfloat16(wanted, largest, stored) -> None:
    assert storage_dtype(wanted, torch.tensor([0.0, -largest]), torch.empty(0)) == stored
    assert storage_dtype(wanted, torch.zeros(3), torch.tensor([largest])) == stored

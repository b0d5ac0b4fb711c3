"""Four bits after a rotation."""

from __future__ import annotations

import pytest
import torch

from tersor.kv.bench.peers.rotated import Rotated, hadamard, rotate, rotate_back
from tersor.lowbit.codecs import affine_encode


@pytest.mark.parametrize("order", [1, 2, 64, 128])
def test_hadamard_is_orthogonal_and_its_own_inverse(order: int) -> None:
    matrix = hadamard(order)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order), rtol=0, atol=1e-6)
    assert torch.equal(matrix, matrix.T)


def test_hadamard_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard(96)


@pytest.mark.parametrize("dim", [1, 7, 64, 80])
def test_rotation_is_exact_at_16_bits(dim: int) -> None:
    """Read back and rounded to float16, tokens are what they were; scores do not change either."""
    tokens = torch.randn(2, 3, 5, dim, generator=torch.Generator().manual_seed(dim))
    tokens = ((tokens * 64).round() / 64).half()  # on a grid that float16 holds and rounding errors cannot leave
    rotated = rotate(tokens)
    assert torch.equal((rotate_back(rotated, dim) * 64).round().half() / 64, tokens)
    scores, wide = rotated @ rotated.transpose(-1, -2), tokens.float()
    torch.testing.assert_close(scores, wide @ wide.transpose(-1, -2), rtol=1e-4, atol=1e-4)


def test_rotation_tames_an_outlier_channel() -> None:
    tokens = torch.randn(1, 2, 40, 64, generator=torch.Generator().manual_seed(0))
    tokens[..., 5] += 40
    plain = affine_encode(tokens, 4, (-1,), valid=None, param_dtype=torch.float16).decode()
    rotated = Rotated(4).decode(Rotated(4).encode(tokens), 64)
    assert (rotated - tokens).abs().mean() < 0.5 * (plain - tokens).abs().mean()


def test_eight_bits_are_nearly_exact() -> None:
    tokens = torch.randn(1, 2, 9, 80, generator=torch.Generator().manual_seed(1))
    stored = Rotated(8).encode(tokens)
    assert stored[0].shape == (1, 2, 9, 128)
    torch.testing.assert_close(Rotated(8).decode(stored, 80), tokens, rtol=0, atol=0.02)

"""Invariants 2 and 3: error bounds of the codecs, and the sets that break naive ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.lowbit.codecs import channel_scale, encode_keys_channelwise, encode_values_channel_separable


def tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    # A few channels are much larger than the rest, as in real caches.
    x[..., ::7] *= 30
    return x


def ulp(parameter: Tensor) -> Tensor:
    """Spacing of storage precision at a parameter."""
    return parameter.float().abs() * torch.finfo(parameter.dtype).eps + torch.finfo(parameter.dtype).tiny


def check_key_bound(encode, bits: int, dtype: torch.dtype) -> None:
    keys = tokens(2, 3, 33, 16).to(dtype)
    coded = encode(keys, bits)
    error = (coded.decode() - keys.float()).abs()
    slack = ulp(coded.minimum) + (2**bits - 1) * ulp(coded.step)
    assert (error <= coded.step.float() / 2 + slack).all()
    # Both ends of every channel come back.
    for end in (keys.float().argmin(2, keepdim=True), keys.float().argmax(2, keepdim=True)):
        assert (error.gather(2, end) <= slack + 1e-6).all()


def check_value_bound(encode, bits: int) -> None:
    values = tokens(2, 3, 33, 16, seed=1)
    scale = channel_scale(values)
    coded = encode(values, bits, scale)
    error = (coded.decode() * scale.float() - values).abs()
    slack = ulp(coded.minimum) + (2**bits - 1) * ulp(coded.step)
    assert (error <= scale.float() * (coded.step.float() / 2 + slack) * 1.001 + 1e-6).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keys_stay_within_half_a_step(bits: int, dtype: torch.dtype) -> None:
    check_key_bound(encode_keys_channelwise, bits, dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_head", [False, True])
def test_values_stay_within_half_a_scaled_step(bits: int, per_head: bool) -> None:
    def encode(values: Tensor, bits: int, scale: Tensor):
        return encode_values_channel_separable(values, bits, scale, per_head=per_head)

    check_value_bound(encode, bits)


def truncating_encoder(keys: Tensor, bits: int, **kwargs):
    coded = encode_keys_channelwise(keys, bits, **kwargs)
    # Half a step lower and then rounded: what truncation instead of rounding does.
    return encode_keys_channelwise(keys - coded.step.float() / 2, bits, **kwargs)


def forgotten_scale(values: Tensor, bits: int, scale: Tensor):
    return encode_values_channel_separable(values, bits, torch.ones_like(scale))


def scale_on_the_wrong_axis(values: Tensor, bits: int, scale: Tensor):
    return encode_values_channel_separable(values, bits, scale.flip(-1))


def test_the_bounds_catch_broken_codecs() -> None:
    with pytest.raises(AssertionError):
        check_key_bound(truncating_encoder, 4, torch.float32)
    for broken in (forgotten_scale, scale_on_the_wrong_axis):
        with pytest.raises(AssertionError):
            check_value_bound(broken, 4)


def check_degenerate(encode, dim: int = 8) -> None:
    keys = tokens(1, 2, 5, dim)
    keys[..., 0] = 3.25  # constant, exact in float16
    keys[..., 1] = 0.0
    coded = encode(keys, 2).decode()
    assert torch.isfinite(coded).all()
    assert torch.equal(coded[..., :2], keys[..., :2])
    single = tokens(1, 2, 1, dim).half().float()
    assert torch.equal(encode(single, 4).decode(), single)


def test_constant_zero_and_single_sets_come_back_exactly() -> None:
    check_degenerate(encode_keys_channelwise)


class Unguarded:
    """The published quantizer without guards: a constant set divides zero by zero."""

    def __init__(self, keys: Tensor, bits: int):
        low = keys.amin(2, keepdim=True)
        step = (keys.amax(2, keepdim=True) - low) / (2**bits - 1)
        self.decoded = ((keys - low) / step).round() * step + low

    def decode(self) -> Tensor:
        return self.decoded


def test_the_degenerate_check_catches_a_missing_guard() -> None:
    with pytest.raises(AssertionError):
        check_degenerate(Unguarded)


def test_zero_value_channel_is_reconstructed_as_zero() -> None:
    values = tokens(2, 2, 6, 8)
    values[:, 1, :, 3] = 0.0
    scale = channel_scale(values)
    assert (scale[:, 1, :, 3] == 0).all()
    decoded = encode_values_channel_separable(values, 2, scale).decode() * scale.float()
    assert torch.isfinite(decoded).all()
    assert (decoded[:, 1, :, 3] == 0).all()


def test_channel_scale_is_the_papers_square_root() -> None:
    values = tokens(1, 2, 9, 8)
    expected = values.abs().amax(2, keepdim=True).sqrt()
    torch.testing.assert_close(channel_scale(values, param_dtype=torch.float32), expected)


def test_power_one_is_invariant_to_channel_scaling() -> None:
    values = tokens(1, 2, 9, 8)
    factors = torch.logspace(-1, 2, 8)
    codes = []
    for x in (values, values * factors):
        scale = channel_scale(x, power=1.0, param_dtype=torch.float32)
        codes.append(encode_values_channel_separable(x, 4, scale, param_dtype=torch.float32).unpack().int())
    assert (codes[0] - codes[1]).abs().max() <= 1
    assert (codes[0] != codes[1]).float().mean() < 0.02  # only what rounding moves over an edge


def test_a_constant_added_to_all_keys_of_a_channel_changes_no_code() -> None:
    """Key-shift stress: channelwise keys do not care, while parameters per token do."""
    generator = torch.Generator().manual_seed(3)
    # Multiples of 1/64 keep every sum exact, so that equality is exact as well.
    keys = (torch.randn(1, 2, 20, 8, generator=generator) * 64).round() / 64
    shift = (torch.randn(1, 2, 1, 8, generator=generator) * 20).round()
    plain, shifted = (encode_keys_channelwise(x, 4, param_dtype=torch.float32).unpack() for x in (keys, keys + shift))
    assert torch.equal(plain, shifted)
    per_token = [
        encode_keys_channelwise(x.transpose(2, 3), 4, param_dtype=torch.float32).unpack() for x in (keys, keys + shift)
    ]
    assert not torch.equal(*per_token)


def test_parameters_are_rounded_before_codes_are_computed() -> None:
    """With bfloat16 parameters the rounding is coarse enough to move codes."""
    keys = tokens(1, 1, 64, 16, seed=5)
    coded = encode_keys_channelwise(keys, 8, param_dtype=torch.bfloat16)
    exact = encode_keys_channelwise(keys, 8, param_dtype=torch.float32)
    with_late_rounding = exact.unpack() * coded.step.float() + coded.minimum.float()
    assert (coded.decode() - keys).abs().mean() < (with_late_rounding - keys).abs().mean()


def test_padding_does_not_shape_parameters() -> None:
    keys = tokens(2, 2, 10, 8)
    valid = torch.ones(2, 1, 10, dtype=torch.bool)
    valid[1, :, :4] = False
    dirty = keys.clone()
    dirty[1, :, :4] = 1e4
    coded = encode_keys_channelwise(dirty, 4, valid=valid)
    alone = encode_keys_channelwise(keys[1:, :, 4:], 4)
    assert torch.equal(coded.minimum[1:], alone.minimum)
    assert torch.equal(coded.step[1:], alone.step)
    assert torch.equal(coded.unpack()[1:, :, 4:], alone.unpack())


def test_no_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token"):
        encode_keys_channelwise(torch.zeros(1, 1, 0, 8), 4)

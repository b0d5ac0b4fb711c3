"""Layouts of the quantizer table: what each shares, and that a stress is undone exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor import zoo
from tersor.kv.bench.layouts import LAYOUTS, Stress, groupwise, score_layouts, stresses, tokenwise


def caches(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 40, 32, generator=generator), torch.randn(2, 2, 40, 32, generator=generator)


def error(layout: str, stress: Stress, bits: int = 4) -> tuple[float, float]:
    keys, values = caches()
    got = stress.quantize(keys, values, layout, bits)
    return tuple(float((a - b).square().mean()) for a, b in zip(got, (keys, values), strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_falls_with_bits(layout: str) -> None:
    for part in (0, 1):
        by_bits = [error(layout, Stress(), bits)[part] for bits in (2, 4, 8)]
        assert by_bits[0] > 4 * by_bits[1] > 16 * by_bits[2]


def test_tokenwise_and_groupwise_share_what_they_say() -> None:
    """Scaling one token scales its error alone; scaling one group touches no other group."""
    x, _ = caches()
    louder = x.clone()
    louder[:, :, 7] *= 64
    assert torch.equal(tokenwise(x, 4)[:, :, :7], tokenwise(louder, 4)[:, :, :7])
    louder = x.clone()
    louder[..., :16] *= 64
    assert torch.equal(groupwise(x, 4)[..., 16:], groupwise(louder, 4)[..., 16:])
    assert not torch.equal(tokenwise(x, 4)[..., 16:], tokenwise(louder, 4)[..., 16:])


def test_outlier_channels_break_tokenwise_and_not_ours() -> None:
    """Mean squared error, relative to the plain cache, by layout: the mechanism of the paper's table."""
    model, _ = zoo.load("tiny-lm")
    outliers = stresses(model, 40)["outlier channels"]
    growth = {
        name: [b / a for a, b in zip(error(name, Stress()), error(name, outliers), strict=True)] for name in LAYOUTS
    }
    assert growth["tokenwise"][0] > 20
    assert growth["tokenwise"][1] > 20
    ours = growth["channelwise K + channel-separable V"]
    assert ours[0] < 1.1
    assert ours[1] < 5 < growth["channelwise K + tokenwise V"][1]


def test_key_shift_breaks_tokenwise_and_not_channelwise() -> None:
    model, _ = zoo.load("tiny-lm")
    shift = stresses(model, 40)["key shift"]
    assert error("tokenwise", shift)[0] > 50 * error("tokenwise", Stress())[0]
    assert error("channelwise K + tokenwise V", shift)[0] < 1.5 * error("channelwise K + tokenwise V", Stress())[0]


def test_key_bias_is_the_rotated_vector() -> None:
    """At position 0 the rotary embedding is the identity, and every position keeps the norm."""
    model, _ = zoo.load("tiny-lm")
    variants = stresses(model, 9)
    shift, bias = variants["key shift"].key_shift, variants["key bias"].key_shift
    assert isinstance(shift, Tensor)
    assert isinstance(bias, Tensor)
    torch.testing.assert_close(bias[:, :, :1], shift)
    torch.testing.assert_close(bias.norm(dim=-1), shift.norm(dim=-1).expand(-1, -1, 9), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(bias[:, :, 5:6], shift, atol=1.0)


def test_scores_cover_every_pair_and_exact_is_the_same_everywhere() -> None:
    model, tokenizer = zoo.load("tiny-lm")
    scores = score_layouts(model, tokenizer.encode, zoo.book(), n=2, bits=8, prefix=64, continuation=16)
    exact = [by_layout["exact"].values for by_layout in scores.values()]
    assert all(values == exact[0] for values in exact)
    assert {tuple(by_layout) for by_layout in scores.values()} == {("exact", *LAYOUTS)}

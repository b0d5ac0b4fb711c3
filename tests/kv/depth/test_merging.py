"""The merging formulas against their laws: angles, lengths, errors, rotations, and which tokens stay apart."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.kv.depth import merging
from tersor.kv.depth.merging import (
    MergedPair,
    angle,
    as_heads,
    as_units,
    length_and_direction,
    mean_relative_errors,
    merge_pair,
    relative_errors,
    restore,
    retained,
    slerp,
)

SHAPE = (2, 3, 5, 16)  # batch, heads, tokens, dim
GRANULARITIES = ("head", "token")

seeds = st.integers(0, 2**31)
shares = st.sampled_from([0.0, 0.25, 0.5, 0.6, 1.0])
grains = st.sampled_from(GRANULARITIES)


def two_layers(seed: int, *, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A pair of layers with lengths of their own; a small ``spread`` makes them similar."""
    generator = torch.Generator().manual_seed(seed)
    x1, noise = (torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(2))
    scale = torch.rand(SHAPE[:3], generator=generator, dtype=dtype)[..., None] * 3 + 0.1
    return x1, scale * (x1 + spread * noise)


def back(pair: MergedPair) -> tuple[Tensor, Tensor]:
    """Both layers restored."""
    dim = pair.directions.shape[-1]
    lengths = [m if m.shape[1] == pair.directions.shape[1] else m.expand(-1, SHAPE[1], -1) for m in pair.lengths]
    assert dim == SHAPE[-1]
    return restore(pair.directions, lengths[0]), restore(pair.directions, lengths[1])


def relative(x_hat: Tensor, x: Tensor, granularity: str) -> Tensor:
    x_hat, x = as_units(x_hat, granularity), as_units(x, granularity)
    return (x_hat - x).norm(dim=-1) / x.norm(dim=-1)


# -- the laws of merging ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seeds, shares, grains)
def test_the_direction_lies_at_its_share_of_the_angle(seed: int, t: float, granularity: str) -> None:
    x1, x2 = two_layers(seed)
    pair = merge_pair(x1, x2, t, granularity=granularity)
    direction = as_units(pair.directions, granularity)
    u1, u2 = (length_and_direction(as_units(x, granularity))[1] for x in (x1, x2))
    omega = pair.distance * math.pi
    torch.testing.assert_close(angle(direction, u1), t * omega, atol=1e-4, rtol=0)
    torch.testing.assert_close(angle(direction, u2), (1 - t) * omega, atol=1e-4, rtol=0)
    torch.testing.assert_close(omega, (u1 * u2).sum(-1).clamp(-1, 1).arccos(), atol=1e-3, rtol=0)


@settings(max_examples=40, deadline=None)
@given(seeds, shares, grains)
def test_lengths_are_exact_and_errors_follow_the_law(seed: int, t: float, granularity: str) -> None:
    layers = two_layers(seed)
    pair = merge_pair(*layers, t, granularity=granularity)
    for x, x_hat, predicted, of_pair in zip(
        layers, back(pair), relative_errors(pair.distance, t), pair.errors, strict=True
    ):
        units, units_hat = as_units(x, granularity), as_units(x_hat, granularity)
        torch.testing.assert_close(units_hat.norm(dim=-1), units.norm(dim=-1), rtol=1e-6, atol=0)
        torch.testing.assert_close(relative(x_hat, x, granularity), predicted, atol=1e-5, rtol=0)
        torch.testing.assert_close(of_pair, predicted)


def test_the_law_in_numbers() -> None:
    """Cosine 0.85 at the midpoint costs 0.28, cosine 0.62 costs 0.44."""
    for cosine, error in ((0.85, 0.277), (0.62, 0.446)):
        distance = torch.tensor(math.acos(cosine) / math.pi)
        assert float(relative_errors(distance, 0.5)[0]) == pytest.approx(error, abs=2e-2)


@settings(max_examples=20, deadline=None)
@given(seeds, grains)
def test_the_ends_restore_one_layer(seed: int, granularity: str) -> None:
    layers = two_layers(seed)
    for t, kept in ((0.0, 0), (1.0, 1)):
        restored = back(merge_pair(*layers, t, granularity=granularity))[kept]
        torch.testing.assert_close(restored, layers[kept], rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(0, 1), grains, st.floats(1e-3, 1e3))
def test_proportional_layers_lose_nothing(seed: int, t: float, granularity: str, factor: float) -> None:
    x1, _ = two_layers(seed)
    pair = merge_pair(x1, factor * x1, t, granularity=granularity)
    torch.testing.assert_close(back(pair)[0], x1, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(back(pair)[1], factor * x1, rtol=1e-5, atol=1e-6 * factor)
    assert not pair.undefined.any()
    flipped = merge_pair(x1, -factor * x1, t, granularity=granularity)
    assert flipped.undefined.all()
    assert torch.isfinite(flipped.directions).all()
    assert retained(flipped.distance.amax(1), gamma=0.0, undefined=flipped.undefined.any(1)).all()


def rotation(seed: int, dim: int) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed)))[0]


def rope(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary positions as Llama applies them."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None] * base ** (-torch.arange(half) / half)
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


@settings(max_examples=20, deadline=None)
@given(seeds, shares, grains)
def test_merging_commutes_with_rotations(seed: int, t: float, granularity: str) -> None:
    layers = two_layers(seed)
    turn = rotation(seed, SHAPE[-1])
    for rotate in (lambda x: x @ turn, rope):
        pair = merge_pair(*layers, t, granularity=granularity)
        turned = merge_pair(*map(rotate, layers), t, granularity=granularity)
        torch.testing.assert_close(turned.directions, rotate(pair.directions), atol=1e-5, rtol=0)
        torch.testing.assert_close(turned.distance, pair.distance, atol=1e-5, rtol=0)
    # Two layers with other rotary bases do not commute: they must not be paired.
    other = merge_pair(rope(layers[0]), rope(layers[1], base=100.0), 0.5)
    assert (other.directions - rope(merge_pair(*layers, 0.5).directions)).abs().max() > 0.05


# -- units and edges -----------------------------------------------------------------------------------------------


def test_units_and_heads_are_inverse() -> None:
    x = two_layers(0)[0]
    for granularity in GRANULARITIES:
        assert torch.equal(as_heads(as_units(x, granularity), SHAPE[1], SHAPE[-1]), x)
    assert as_units(x, "token").shape == (2, 1, 5, 48)
    one_head = x[:, :1]
    assert torch.equal(as_heads(as_units(one_head, "token"), 1, SHAPE[-1]), one_head)


def test_zero_vectors_restore_to_zero() -> None:
    x1, x2 = two_layers(0)
    x1[:, :, 0] = 0
    x2[:, :, 1] = 0
    x1[:, :, 2] = x2[:, :, 2] = 0
    for granularity in GRANULARITIES:
        pair = merge_pair(x1, x2, 0.6, granularity=granularity)
        first, second = back(pair)
        assert not first[:, :, [0, 2]].any()
        assert not second[:, :, [1, 2]].any()
        torch.testing.assert_close(second[:, :, 0], x2[:, :, 0])
        torch.testing.assert_close(first[:, :, 1], x1[:, :, 1])
        assert not pair.undefined[:, :, :3].any()
        assert torch.isfinite(pair.directions).all()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_extreme_sizes_neither_overflow_nor_vanish(size: float) -> None:
    x1, x2 = (x * size for x in two_layers(1, spread=0.1))
    pair = merge_pair(x1, x2, 0.5)
    assert torch.isfinite(pair.directions).all()
    torch.testing.assert_close(pair.lengths[0] / size, x1.div(size).norm(dim=-1))


def test_small_angles_are_exact() -> None:
    """An arc cosine in float32 would call everything below 3e-4 the same direction."""
    x1 = torch.zeros(1, 1, 3, 4)
    x1[..., 0] = 1
    x2 = x1.clone()
    x2[0, 0, :, 1] = torch.tensor([1e-5, 1e-4, 1e-3])
    pair = merge_pair(x1, x2, 0.25)
    torch.testing.assert_close(pair.distance[0, 0] * math.pi, torch.tensor([1e-5, 1e-4, 1e-3]), rtol=1e-3, atol=0)
    torch.testing.assert_close(
        pair.directions[0, 0, :, 1], torch.tensor([0.25e-5, 0.25e-4, 0.25e-3]), rtol=1e-3, atol=0
    )


def test_half_precision_is_merged_in_float32() -> None:
    layers = [x.bfloat16() for x in two_layers(2)]
    pair = merge_pair(layers[0], layers[1], 0.5)
    assert pair.directions.dtype == pair.lengths[0].dtype == torch.float32
    assert merge_pair(*two_layers(2, dtype=torch.float64), 0.5).directions.dtype == torch.float64


@settings(max_examples=20, deadline=None)
@given(seeds, grains)
def test_mean_merging_is_the_mean_and_its_error_law(seed: int, granularity: str) -> None:
    layers = two_layers(seed)
    pair = merge_pair(*layers, 0.6, granularity=granularity, merge="mean")
    first, second = back(pair)
    torch.testing.assert_close(first, sum(layers) / 2, rtol=1e-5, atol=1e-6)
    assert torch.equal(first, second)
    for x, error in zip(layers, pair.errors, strict=True):
        torch.testing.assert_close(relative(first, x, granularity), error, atol=1e-4, rtol=1e-4)
    zero = torch.zeros(1)
    assert mean_relative_errors(zero, zero, zero)[0] == 0


# -- which tokens stay apart ---------------------------------------------------------------------------------------


def at_cosine(cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Two layers of one head whose token ``i`` has the given cosine."""
    x1, x2 = torch.zeros(1, 1, len(cosine), 4), torch.zeros(1, 1, len(cosine), 4)
    x1[..., 0] = 2
    x2[0, 0, :, 0], x2[0, 0, :, 1] = 3 * cosine, 3 * (1 - cosine**2).sqrt()
    return x1, x2


def check_planted_outliers() -> None:
    cosine = torch.full((100,), 0.8) + torch.linspace(-0.05, 0.05, 100)
    planted = [0, 17, 63]
    cosine[planted] = -0.6
    distance = merge_pair(*at_cosine(cosine), 0.6).distance[:, 0]
    for rule in ("range", "quantile"):
        gamma = 0.05 if rule == "range" else 0.03
        kept = merging.retained(distance, gamma=gamma, rule=rule, max_fraction=0.1)
        assert kept[0].nonzero()[:, 0].tolist() == planted


def test_planted_outliers_are_found() -> None:
    check_planted_outliers()


def test_the_outlier_check_catches_the_printed_inequality(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's ``d < d_min + gamma (d_max - d_min)`` with ``d`` an angle keeps the most similar tokens."""
    right = merging.retained
    monkeypatch.setattr(merging, "retained", lambda distance, **kw: right(-distance, **kw))
    with pytest.raises(AssertionError):
        check_planted_outliers()


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 60), st.floats(0, 1), st.sampled_from(["range", "quantile"]), st.floats(0, 1))
def test_what_is_retained_is_the_most_distant(seed: int, tokens: int, gamma: float, rule: str, cap: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    distance = torch.rand(3, tokens, generator=generator)
    valid = torch.rand(3, tokens, generator=generator) < 0.8
    kept = retained(distance, gamma=gamma, rule=rule, valid=valid, max_fraction=cap)
    assert not (kept & ~valid).any()
    for row in range(3):
        inside, outside = distance[row][kept[row]], distance[row][valid[row] & ~kept[row]]
        if len(inside) and len(outside):
            assert inside.min() >= outside.max()
        n = int(valid[row].sum())
        if gamma == 1.0:
            assert len(outside) == 0
        elif rule == "quantile":
            assert len(inside) == min(n, math.ceil(round(gamma * n, 9)))
        else:
            assert len(inside) <= math.floor(round(cap * n, 9))
        # A sample is decided by itself, whatever stands beside it.
        if n:
            alone = retained(distance[row : row + 1, valid[row]], gamma=gamma, rule=rule, max_fraction=cap)
            assert torch.equal(alone[0], kept[row][valid[row]])


@pytest.mark.parametrize(("gamma", "tokens", "count"), [(0.05, 100, 5), (0.07, 100, 7), (0.05, 101, 6), (0.0, 50, 0)])
def test_the_quantile_counts_exactly(gamma: float, tokens: int, count: int) -> None:
    distance = torch.rand(2, tokens, generator=torch.Generator().manual_seed(0))
    assert retained(distance, gamma=gamma, rule="quantile").sum(-1).tolist() == [count, count]


def test_the_cap_keeps_the_most_distant_and_the_earlier_of_equals() -> None:
    distance = torch.tensor([[0.1, 0.9, 0.8, 0.9, 0.85, 0.9, 0.1, 0.1, 0.1, 0.1]])
    kept = retained(distance, gamma=0.5, max_fraction=0.2)
    assert kept[0].nonzero()[:, 0].tolist() == [1, 3]
    assert retained(distance, gamma=0.5, max_fraction=1.0)[0].sum() == 5


def test_gamma_zero_and_one_and_the_undefined() -> None:
    distance = torch.rand(1, 20, generator=torch.Generator().manual_seed(1))
    undefined = torch.zeros(1, 20, dtype=torch.bool)
    undefined[0, [3, 4, 5]] = True
    for rule in ("range", "quantile"):
        assert not retained(distance, gamma=0.0, rule=rule).any()
        assert retained(distance, gamma=1.0, rule=rule, max_fraction=0.1).all()
        # Beyond every limit, since they have no direction to share.
        kept = retained(distance, gamma=0.0, rule=rule, undefined=undefined, max_fraction=0.0)
        assert torch.equal(kept, undefined)


def test_one_token_and_padded_rows() -> None:
    one = torch.tensor([[0.3]])
    assert not retained(one, gamma=0.5).any()
    assert retained(one, gamma=1.0).all()
    valid = torch.tensor([[True, True], [False, False]])
    distance = torch.tensor([[0.2, 0.4], [float("nan"), float("nan")]])
    kept = retained(distance, gamma=0.5, valid=valid, max_fraction=1.0)
    assert kept.tolist() == [[False, True], [False, False]]
    assert retained(torch.full((1, 9), 0.4), gamma=0.9).sum() == 0


def test_slerp_weights_are_the_papers_formula() -> None:
    u1, u2 = (length_and_direction(x)[1] for x in two_layers(5))
    omega = (u1 * u2).sum(-1, keepdim=True).arccos()
    expected = (((1 - 0.3) * omega).sin() * u1 + (0.3 * omega).sin() * u2) / omega.sin()
    torch.testing.assert_close(slerp(u1, u2, 0.3), expected, atol=1e-5, rtol=0)

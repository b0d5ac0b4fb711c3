"""The parts of raster and NAR models against the formulas."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tersor.grids.blocks import (
    Attention,
    Block,
    FeedForward,
    Norm,
    Widths,
    unscaled_norm,
)


class Sizes(Widths):
    """Two key heads for four query heads, of 8 channels."""

    hidden_size, num_attention_heads, num_key_value_heads = 32, 4, 2
    rms_norm_eps, residual_dropout, ffn_dropout = 1e-5, 0.0, 0.0
    num_classes, caption_size, condition_tokens = 5, 6, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("hidden", "heads", "width"), [(1024, 16, 2816), (768, 12, 2048), (32, 2, 256), (384, 6, 1024)]
)
def test_widths_follow_from_the_hidden_size(hidden: int, heads: int, width: int) -> None:
    sizes = Widths()
    sizes.hidden_size, sizes.num_attention_heads = hidden, heads
    assert sizes.intermediate_size == width
    assert sizes.head_dim == hidden // heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_norm_divides_by_the_root_of_the_mean_square(dtype: torch.dtype) -> None:
    """In float32 whatever comes in, and rounded before the scale."""
    x, norm = (3 * random(2, 4, 16)).to(dtype), Norm(16, eps=0.5)
    norm.weight.data = random(16, seed=1)
    exact = x.float()
    expected = exact / (exact.pow(2).mean(-1, keepdim=True) + 0.5).sqrt()
    assert unscaled_norm(x, 0.5).dtype == dtype
    torch.testing.assert_close(unscaled_norm(x, 0.5), expected.to(dtype))
    torch.testing.assert_close(norm(x), expected.to(dtype) * norm.weight)


def attended(layer: Attention, x: Tensor, allowed: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Attention of each head and token by itself."""
    heads, key_heads, width = 4, 2, 8
    batch, tokens, _ = x.shape
    mixed = layer.wqkv(x).view(batch, tokens, heads + 2 * key_heads, width)
    q, k, v = mixed.split([heads, key_heads, key_heads], dim=2)
    if rotation is not None:
        cosine, sine = rotation
        q, k = (
            torch.stack(
                [
                    each[..., 0::2] * cosine[..., 0::2] - each[..., 1::2] * sine[..., 1::2],
                    each[..., 1::2] * cosine[..., 1::2] + each[..., 0::2] * sine[..., 1::2],
                ],
                dim=-1,
            ).flatten(-2)
            for each in (q, k)
        )
    out = torch.zeros(batch, tokens, heads, width)
    for sample in range(batch):
        for head in range(heads):
            for row in range(tokens):
                seen = allowed[row].nonzero()[:, 0]
                scores = k[sample, seen, head // 2] @ q[sample, row, head] / width**0.5
                out[sample, row, head] = scores.softmax(0) @ v[sample, seen, head // 2]
    return layer.wo(out.flatten(2))


@pytest.mark.parametrize("causal", [True, False])
def test_without_a_mask_tokens_see_each_other_in_order_or_all(causal: bool) -> None:
    layer, x = Attention(Sizes(), 0, causal=causal), random(2, 5, 32)
    allowed = torch.ones(5, 5, dtype=torch.bool)
    torch.testing.assert_close(layer(x, None, None, None), attended(layer, x, allowed.tril() if causal else allowed))
    odd = allowed.tril().roll(1, 1) | torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(layer(x, None, odd[None, None], None), attended(layer, x, odd))


def test_queries_and_keys_are_turned_and_values_are_not() -> None:
    layer, x = Attention(Sizes(), 0, causal=False), random(1, 4, 32)
    angles = random(4, 1, 4, seed=1)
    sine = torch.stack([-angles.sin(), angles.sin()], dim=-1).flatten(-2)
    rotation = (angles.cos().repeat_interleave(2, -1), sine)
    expected = attended(layer, x, torch.ones(4, 4, dtype=torch.bool), rotation)
    torch.testing.assert_close(layer(x, rotation, None, None), expected)
    assert not torch.allclose(layer(x, None, None, None), expected, atol=1e-3)


def test_a_cache_gets_its_layer_s_keys_and_adds_to_them() -> None:
    layer, x = Attention(Sizes(), 3, causal=True), random(1, 5, 32)
    store: list[tuple[Tensor, Tensor]] = []

    def update(keys: Tensor, values: Tensor, number: int) -> tuple[Tensor, Tensor]:
        assert number == 3 and keys.shape[1:] == values.shape[1:] == (2, 1, 8)
        store.append((keys, values))
        return tuple(torch.cat(each, dim=2) for each in zip(*store, strict=True))  # type: ignore[return-value]

    cache = SimpleNamespace(update=update)
    steps = [layer(x[:, place : place + 1], None, None, cache) for place in range(5)]
    torch.testing.assert_close(torch.cat(steps, dim=1), layer(x, None, None, None))


def test_the_feed_forward_gates_by_its_first_matrix() -> None:
    layer, x = FeedForward(Sizes()), random(2, 3, 32)
    gate = x @ layer.w1.weight.T
    expected = (gate * torch.sigmoid(gate) * (x @ layer.w3.weight.T)) @ layer.w2.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_a_block_adds_each_part_to_what_it_read() -> None:
    block, x = Block(Sizes(), 0, causal=True).eval(), random(2, 3, 32)
    for norm in (block.attention_norm, block.ffn_norm):
        norm.weight.data = random(32, seed=2)
    middle = x + block.attention(block.attention_norm(x), None, None, None)
    expected = middle + block.feed_forward(block.ffn_norm(middle))
    torch.testing.assert_close(block(x, None, None, None), expected)
    torch.testing.assert_close(block.train()(x, None, None, None), expected)


@pytest.mark.parametrize("place", ["residual_dropout", "ffn_dropout"])
def test_dropout_falls_on_what_is_added_and_in_training_alone(place: str) -> None:
    sizes = Sizes()
    setattr(sizes, place, 1.0)
    block, x = Block(sizes, 0, causal=True), random(2, 3, 32)
    if place == "residual_dropout":
        expected = x + block.feed_forward(block.ffn_norm(x))
    else:
        expected = x + block.attention(block.attention_norm(x), None, None, None)
    torch.testing.assert_close(block.train()(x, None, None, None), expected)
    assert not torch.allclose(block.eval()(x, None, None, None), expected, atol=1e-3)

"""Invariant 4: attention on packed tokens equals dequantizing first, for every back end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.lowbit.codecs import channel_scale, encode_keys_channelwise, encode_values_channel_separable
from tersor.lowbit.kernels import KERNELS, backends, get_kernel
from tersor.lowbit.kernels.packed_attention import PackedPart, RawPart, reference

BACKENDS = backends("packed_attention")


def dequantize_then_attend(query: Tensor, parts: list, scaling: float) -> tuple[Tensor, Tensor]:
    keys, values, masks = [], [], []
    for part in parts:
        if isinstance(part, PackedPart):
            key, value = part.keys.decode(), part.values.decode() * part.channel_scale.float()
        else:
            key, value = part.keys.float(), part.values.float()
        keys.append(key)
        values.append(value)
        mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool) if part.mask is None else part.mask
        masks.append(mask.expand(query.shape[0], key.shape[1], query.shape[2], key.shape[2]))
    key, value, mask = torch.cat(keys, 2), torch.cat(values, 2), torch.cat(masks, 3)
    group = query.shape[1] // key.shape[1]
    key, value, mask = (x.repeat_interleave(group, 1) for x in (key, value, mask))
    scores = (query.float() @ key.transpose(-1, -2) * scaling).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def make_case(
    seed: int,
    *,
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    queries: int = 1,
    key_dim: int = 16,
    value_dim: int = 16,
    bits: tuple[int, ...] = (4, 2),
    counts: tuple[int, ...] = (13, 9),
    raw: int = 5,
    masked: bool = True,
    per_head: bool = False,
) -> tuple[Tensor, list, float]:
    """Random groups of ``counts`` tokens, a raw buffer and random masks that leave a token open for every query."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    query = draw(batch, kv_heads * group, queries, key_dim)
    parts: list = []
    for bit, count in zip(bits, counts, strict=True):
        keys, values = draw(batch, kv_heads, count, key_dim) + 2, draw(batch, kv_heads, count, value_dim)
        scale = channel_scale(values)
        mask = None
        if masked:
            mask = torch.rand(batch, 1, queries, count, generator=generator) < 0.7
        parts.append(
            PackedPart(
                encode_keys_channelwise(keys, bit),
                encode_values_channel_separable(values, bit, scale, per_head=per_head),
                scale,
                mask,
            )
        )
    if raw:
        parts.append(RawPart(draw(batch, kv_heads, raw, key_dim), draw(batch, kv_heads, raw, value_dim)))
    return query, parts, key_dim**-0.5


def check_equals_dequantized(kernel, case: tuple[Tensor, list, float]) -> None:
    query, parts, scaling = case
    output, lse = kernel(query, parts, scaling=scaling)
    expected, expected_lse = dequantize_then_attend(query, parts, scaling)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (24, 10), (7, 5), (80, 96)])
def test_equals_dequantize_then_attend(backend: str, group: int, key_dim: int, value_dim: int) -> None:
    case = make_case(group, group=group, key_dim=key_dim, value_dim=value_dim, queries=3)
    check_equals_dequantized(get_kernel("packed_attention", backend), case)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@settings(max_examples=40)
def test_random_shapes(backend: str, data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 3))
    case = make_case(
        data.draw(st.integers(0, 10**6)),
        batch=data.draw(st.integers(1, 3)),
        kv_heads=data.draw(st.integers(1, 3)),
        group=data.draw(st.integers(1, 4)),
        queries=data.draw(st.integers(1, 4)),
        key_dim=data.draw(st.integers(1, 40)),
        value_dim=data.draw(st.integers(1, 40)),
        bits=tuple(data.draw(st.sampled_from([2, 4, 8])) for _ in range(groups)),
        counts=tuple(data.draw(st.integers(1, 30)) for _ in range(groups)),
        raw=data.draw(st.integers(1, 6)),
        masked=data.draw(st.booleans()),
        per_head=data.draw(st.booleans()),
    )
    check_equals_dequantized(get_kernel("packed_attention", backend), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_tokens_than_a_tile(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "TILE_TOKENS", 32)
    check_equals_dequantized(get_kernel("packed_attention", backend), make_case(1, counts=(100, 33), queries=2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_may_look_nowhere_gets_zeros(backend: str) -> None:
    query, parts, scaling = make_case(2, raw=0, counts=(4, 4))
    for part in parts:
        part.mask = torch.zeros(2, 1, 1, 4, dtype=torch.bool)
        part.mask[1] = True
    output, lse = get_kernel("packed_attention", backend)(query, parts, scaling=scaling)
    assert (output[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    assert torch.isfinite(output).all()
    assert torch.isfinite(lse[1]).all()


def without_key_minima(query, parts, *, scaling):
    for part in parts:
        if isinstance(part, PackedPart):
            part.keys.minimum = torch.zeros_like(part.keys.minimum)
    return reference.packed_attention(query, parts, scaling=scaling)


def without_merging(query, parts, *, scaling):
    outputs = [reference.packed_attention(query, [part], scaling=scaling) for part in parts]
    output = torch.stack([output for output, _ in outputs]).mean(0)
    return output, torch.stack([lse for _, lse in outputs]).logsumexp(0)


@pytest.mark.parametrize("broken", [without_key_minima, without_merging])
def test_the_check_catches(broken) -> None:
    case = make_case(3)
    query, parts, scaling = case
    expected = dequantize_then_attend(query, parts, scaling)
    output = broken(query, parts, scaling=scaling)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_never_a_whole_dequantized_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the size of the unpacked tokens appears while a long group is read."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.is_floating_point():
                largest = max(largest, result.numel())
            return result

    query, parts, scaling = make_case(4, batch=1, counts=(4096, 4096), masked=False)
    with Watch():
        reference.packed_attention(query, parts, scaling=scaling)
    assert largest < 4096 * 2 * 16 / 4


def test_registry_errors_name_the_choices() -> None:
    with pytest.raises(ValueError, match="choose one of"):
        get_kernel("packed_attention", "abacus")
    with pytest.raises(ValueError, match="choose one of"):
        get_kernel("unknown")
    with pytest.raises(ValueError, match="at least one part"):
        reference.packed_attention(torch.zeros(1, 1, 1, 4), [], scaling=1.0)
    for operation in KERNELS:
        for backend in backends(operation):
            assert callable(get_kernel(operation, backend))

"""Invariant 4: attention on packed tokens equals dequantizing first, for every back end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.kv.engine.tree import map_tensors
from tersor.lowbit.codecs import channel_scale, encode_keys_channelwise, encode_values_channel_separable
from tersor.lowbit.codes import AffineCodes
from tersor.lowbit.kernels import KERNELS, backends, get_kernel, triton_runtime, unavailable_reason
from tersor.lowbit.kernels.packed_attention import PackedPart, PartTable, RawPart, Window, reference

#: Back ends that compute on CPU tensors here, Triton in its interpreter.
BACKENDS = [
    name
    for name in backends("packed_attention")
    if (triton_runtime.available("cpu") if name == "triton" else unavailable_reason("packed_attention", name) is None)
]
#: Random cases for each; the interpreter takes a third of a second for one.
EXAMPLES = {"cpu": 500, "triton": 40, "reference": 100}


@dataclass
class Case:
    """One call of the kernel."""

    query: Tensor
    parts: list
    scaling: float
    window: Window | None = None
    mask: Tensor | None = None
    score_bias: Tensor | None = None

    def run(self, kernel) -> tuple[Tensor, Tensor]:
        return kernel(
            self.query, self.parts, self.window, scaling=self.scaling, mask=self.mask, score_bias=self.score_bias
        )

    def expected(self) -> tuple[Tensor, Tensor]:
        """Everything dequantized, put in the order of the parts, and one plain softmax."""
        batch, heads, queries, _ = self.query.shape
        columns = []
        for part in self.parts:
            if isinstance(part, PackedPart):
                key, value = part.keys.decode(), part.values.decode() * part.channel_scale.float()
            else:
                key, value = part.keys.float(), part.values.float()
            key = key if part.key_factor is None else key * part.key_factor[..., None]
            value = value if part.value_factor is None else value * part.value_factor[..., None]
            opened = torch.ones(batch, heads, queries, key.shape[2], dtype=torch.bool)
            added = torch.zeros(batch, heads, queries, key.shape[2])
            for b, head, token in product(range(batch), range(heads), range(key.shape[2])):
                scope = 0 if part.positions is None else head * part.positions.shape[1] // heads
                if part.positions is not None:
                    place = int(part.positions[b, scope, token])
                    if self.mask is not None:
                        opened[b, head, :, token] &= self.mask.expand(batch, -1, -1, -1)[b, 0, :, place]
                    if self.score_bias is not None:
                        added[b, head, :, token] = self.score_bias[b, head, :, place]
                if part.valid is not None:
                    opened[b, head, :, token] &= part.valid[b, head * part.valid.shape[1] // heads, token]
            columns.append((key, value, opened, added))
        if self.window is not None:
            key, value = (x[:, :, : self.window.tokens].float() for x in (self.window.keys, self.window.values))
            tokens = self.window.tokens
            if self.mask is not None:
                opened = self.mask[..., -tokens:].expand(batch, heads, -1, -1)
            else:
                opened = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)[None, None]
                if self.window.valid is not None:
                    opened = opened & self.window.valid[:, None, None, :tokens]
                opened = opened.expand(batch, heads, -1, -1)
            columns.append((key, value, opened, torch.zeros(opened.shape)))
        key, value = (torch.cat([each[i] for each in columns], 2) for i in (0, 1))
        opened, added = (torch.cat([each[i] for each in columns], 3) for i in (2, 3))
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
        scores = self.query.float() @ key.transpose(-1, -2) * self.scaling + added
        scores = scores.masked_fill(~opened, -torch.inf)
        return scores.softmax(-1).nan_to_num(0.0) @ value, scores.logsumexp(-1)


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
    masked: str = "queries",
    factors: str = "none",
    biased: bool = False,
    per_head: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Random groups of ``counts`` tokens (16 bits: raw ones) at random places, and a window of ``raw`` tokens.

    ``masked``: "none"; "queries", a mask a query; "ragged", a number of tokens for each sample and head, none of them
    for some. ``factors``: "none", or lengths per token for one or all heads. ``biased``: scores added.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    stored, scopes = sum(counts), kv_heads if per_head else 1
    order = torch.rand(batch, scopes, max(stored, 1), generator=generator).argsort(-1).int()
    query = draw(batch, kv_heads * group, queries, key_dim).to(dtype)
    parts: list = []
    first = 0
    for bit, count in zip(bits, counts, strict=True):
        tokens = max(count, 1)
        keys, values = draw(batch, kv_heads, tokens, key_dim) + 2, draw(batch, kv_heads, tokens, value_dim)
        options: dict[str, Any] = {"positions": order[..., first : first + count].contiguous()}
        if masked == "ragged":
            kept = torch.randint(0, count + 1, (batch, kv_heads, 1), generator=generator)
            options["valid"] = torch.arange(count) < kept
        if factors != "none":
            shape = (batch, 1 if factors == "shared" else kv_heads, count)
            options |= {"key_factor": 1 + draw(*shape) / 4, "value_factor": 1 + draw(*shape)}
        first += count
        if bit == 16:
            keys, values = (x[:, :, :count].to(dtype) for x in (keys, values))
            parts.append(RawPart(keys, values, **options))
            continue
        scale = channel_scale(values)
        coded = (
            encode_keys_channelwise(keys, bit),
            encode_values_channel_separable(values, bit, scale, per_head=per_head),
        )
        parts.append(PackedPart(*coded, scale, **options) if count else without_tokens(PackedPart(*coded, scale)))
    window = mask = score_bias = None
    if raw:
        slots = raw + int(torch.randint(0, 4, (), generator=generator))
        keys, values = (
            draw(batch, kv_heads, slots, key_dim).to(dtype),
            draw(batch, kv_heads, slots, value_dim).to(dtype),
        )
        keys[:, :, raw:] = values[:, :, raw:] = torch.nan  # free slots hold anything
        valid = torch.rand(batch, slots, generator=generator) < 0.7 if masked == "ragged" else None
        window = Window(keys, values, raw, valid)
    if masked == "queries":
        rows = batch if seed % 2 else 1
        mask = torch.rand(rows, 1, queries, stored + raw, generator=generator) < 0.7
    if biased:
        score_bias = draw(batch, kv_heads * group, queries, stored + raw)
    return Case(query, parts, key_dim**-0.5, window, mask, score_bias)


def without_tokens(part: PackedPart) -> PackedPart:
    """The same group with its codes gone, as a crop may leave it."""
    values = part.values
    return PackedPart(
        replace(part.keys, codes=part.keys.codes[:, :, :0]),
        AffineCodes(values.codes[:, :, :0], values.minimum[:, :, :0], values.step[:, :, :0], values.bits, values.dim),
        part.channel_scale,
    )


def check_equals_dequantized(kernel, case: Case) -> None:
    output, lse = case.run(kernel)
    expected, expected_lse = case.expected()
    assert output.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (24, 10), (7, 5), (80, 96)])
def test_equals_dequantize_then_attend(backend: str, group: int, key_dim: int, value_dim: int) -> None:
    case = make_case(group, group=group, key_dim=key_dim, value_dim=value_dim, queries=3)
    check_equals_dequantized(get_kernel("packed_attention", backend), case)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups = draw(st.integers(0, 3))
    dims = st.one_of(st.integers(1, 40), st.sampled_from([64, 80, 96, 128]))
    return make_case(
        draw(st.integers(0, 10**6)),
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 8)),
        queries=draw(st.integers(1, 4)),
        key_dim=draw(dims),
        value_dim=draw(dims),
        bits=tuple(draw(st.sampled_from([2, 3, 4, 8, 16])) for _ in range(groups)),
        counts=tuple(draw(st.integers(0, 40)) for _ in range(groups)),
        raw=draw(st.integers(4, 9)),
        masked=draw(st.sampled_from(["none", "queries", "ragged"])),
        factors=draw(st.sampled_from(["none", "shared", "per head"])),
        biased=draw(st.booleans()),
        per_head=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
    )


def sweep(backend: str, examples: int) -> None:
    @settings(max_examples=examples)
    @given(case=cases())
    def check(case: Case) -> None:
        check_equals_dequantized(get_kernel("packed_attention", backend), case)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_cases(backend: str) -> None:
    sweep(backend, EXAMPLES[backend])


@pytest.mark.slow
@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton has no build for this platform")
def test_more_random_cases_in_the_interpreter() -> None:
    sweep("triton", 300)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton has no build for this platform")
def test_several_splits_of_a_long_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits without an open token, a short last split and more rows than a program holds."""
    from tersor.lowbit.kernels.packed_attention import triton

    case = make_case(5, batch=1, kv_heads=1, group=4, queries=20, counts=(300, 260), masked="none")
    case.parts[0].valid = (torch.arange(300) >= 200)[None, None]
    check_equals_dequantized(triton.packed_attention, case)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"group": 4, "key_dim": 128, "value_dim": 128, "counts": (5000, 3000), "factors": "shared"},
        {
            "group": 8,
            "key_dim": 80,
            "value_dim": 96,
            "queries": 3,
            "bits": (8, 3),
            "counts": (700, 300),
            "biased": True,
        },
        {"group": 1, "key_dim": 16, "value_dim": 16, "counts": (40, 9), "masked": "ragged", "per_head": True},
    ],
    ids=["long", "wide bits", "short"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Half-precision queries are multiplied in TF32, which has as many bits as float16."""
    case = make_case(6, dtype=dtype, **options)
    output, lse = map_tensors(case, lambda x: x.cuda()).run(get_kernel("packed_attention", "triton"))
    expected, expected_lse = replace(case, query=case.query.float()).run(reference.packed_attention)
    limit = 1e-4 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(output.cpu(), expected, rtol=limit, atol=limit * float(expected.abs().max()))
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=limit, atol=limit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_tokens_than_a_tile(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "TILE_TOKENS", 32)
    check_equals_dequantized(get_kernel("packed_attention", backend), make_case(1, counts=(100, 33), queries=2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_may_look_nowhere_gets_zeros(backend: str) -> None:
    case = make_case(2, raw=2, counts=(4, 4))
    case.mask = torch.zeros(2, 1, 1, 10, dtype=torch.bool)
    case.mask[1] = True
    output, lse = case.run(get_kernel("packed_attention", backend))
    assert (output[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    assert torch.isfinite(output).all()
    assert torch.isfinite(lse[1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [2, 3])
def test_a_group_without_tokens_adds_nothing(backend: str, bits: int) -> None:
    check_equals_dequantized(get_kernel("packed_attention", backend), make_case(8, bits=(bits, 4), counts=(0, 6)))


def without_key_minima(query, parts, *args, **options):
    for part in parts:
        if isinstance(part, PackedPart):
            part.keys.minimum = torch.zeros_like(part.keys.minimum)
    return reference.packed_attention(query, parts, *args, **options)


def without_merging(query, parts, window, **options):
    outputs = [reference.packed_attention(query, [part], **options) for part in parts]
    output = torch.stack([output for output, _ in outputs]).mean(0)
    return output, torch.stack([lse for _, lse in outputs]).logsumexp(0)


def without_positions(query, parts, *args, **options):
    """Columns of the mask in the order of the group, not of the sequence."""
    for part in parts:
        part.positions = part.positions.sort(-1).values
    return reference.packed_attention(query, parts, *args, **options)


@pytest.mark.parametrize("broken", [without_key_minima, without_merging, without_positions])
def test_the_check_catches(broken) -> None:
    case = make_case(3)
    check_equals_dequantized(reference.packed_attention, case)
    expected = case.expected()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(case.run(broken), expected, rtol=1e-5, atol=1e-5)


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

    case = make_case(4, batch=1, counts=(4096, 4096), masked="none")
    with Watch():
        case.run(reference.packed_attention)
    assert largest < 4096 * 2 * 16 / 4


def test_registry_errors_name_the_choices() -> None:
    with pytest.raises(ValueError, match="choose one of"):
        get_kernel("packed_attention", "abacus")
    with pytest.raises(ValueError, match="choose one of"):
        get_kernel("unknown")
    with pytest.raises(ValueError, match="at least one part"):
        reference.packed_attention(torch.zeros(1, 1, 1, 4), [], scaling=1.0)
    for operation in KERNELS:
        for backend in BACKENDS:
            assert callable(get_kernel(operation, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts", [(300, 260), (129, 1), (128, 257)])
def test_parts_longer_than_a_tile(backend: str, counts: tuple[int, int]) -> None:
    """A later tile with larger scores rescales all that was summed before it."""
    case = make_case(7, batch=1, kv_heads=1, queries=2, counts=counts, masked="none")
    for part in case.parts:
        part.keys.minimum = part.keys.minimum * 4
    check_equals_dequantized(get_kernel("packed_attention", backend), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_of_parts_serves_many_calls(backend: str) -> None:
    """What a back end keeps of the parts depends on nothing of the call: neither queries, nor mask, nor window."""
    case = make_case(9, counts=(40, 20))
    table = PartTable(case.parts)
    for seed, masked in ((1, "none"), (3, "queries"), (5, "queries")):
        other = make_case(seed, counts=(40, 20), masked=masked, queries=seed)
        other.parts = table
        check_equals_dequantized(get_kernel("packed_attention", backend), other)
        check_equals_dequantized(get_kernel("packed_attention", backend), replace(other, window=None, mask=None))

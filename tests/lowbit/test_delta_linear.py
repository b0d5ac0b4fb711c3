"""Products with packed deltas: every back end adds what the dense matrix would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.lowbit.kernels import backends, get_kernel, triton_runtime, unavailable_reason
from tersor.lowbit.kernels.delta_linear import DeltaGroup, PackedDelta
from tersor.lowbit.packing import pack_half_split

BACKENDS = [
    name
    for name in backends("delta_linear")
    if (triton_runtime.available("cpu") if name == "triton" else unavailable_reason("delta_linear", name) is None)
]
EXAMPLES = {"cpu": 300, "reference": 60, "triton": 6}
BITS = (1, 2, 3, 4, 8)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def make_delta(
    generator: torch.Generator, *, out: int, dim: int, bits: int, salient: int, midrise: bool, dtype: torch.dtype
) -> tuple[PackedDelta, Tensor]:
    """A delta and its dense matrix, float64 ``[out, in]``, written out element by element."""
    codes = torch.randint(0, 2**bits, (out, dim), generator=generator).to(torch.uint8)
    step = (torch.rand(out, generator=generator) * 0.02).to(torch.float16)
    index = torch.randperm(dim, generator=generator)[:salient].sort().values
    weight = torch.randn(out, len(index), generator=generator).to(dtype)
    zero = 2 ** (bits - 1) - (0.5 if midrise else 0.0)
    dense = (codes.double() - zero) * step.double()[:, None]
    for place, channel in enumerate(index.tolist()):
        dense[:, channel] += weight[:, place].double()
    packed = PackedDelta(pack_half_split(codes, bits), step, index.int(), weight, bits=bits, zero=zero, dim=dim)
    return packed, dense


def check(backend: str, x: Tensor, y: Tensor, groups: list[DeltaGroup], dense: list[Tensor]) -> None:
    """Against ``y + x D^T`` in float64; the tolerance is that of sums in float32 and of one rounding."""
    expected, size = y.double().clone(), y.double().abs()
    for (_, rows), matrix in zip(groups, dense, strict=True):
        at = slice(None) if rows is None else rows
        expected[at] += x[at].double() @ matrix.T
        size[at] += x[at].double().abs() @ matrix.abs().T
    device = "cuda" if backend == "triton on a GPU" else "cpu"
    kernel = get_kernel("delta_linear", backend.partition(" ")[0])
    found = kernel(x.to(device), y.clone().to(device), [moved(group, device) for group in groups]).cpu()
    assert found.dtype == y.dtype
    assert found.shape == y.shape
    allowed = 4e-6 * size + torch.finfo(y.dtype).eps * expected.abs() + 1e-7
    assert bool(((found.double() - expected).abs() <= allowed).all())


def moved(group: DeltaGroup, device: str) -> DeltaGroup:
    delta, rows = group
    codes, step, index, weight = (each.to(device) for each in delta.tensors)
    there = PackedDelta(codes, step, index, weight, bits=delta.bits, zero=delta.zero, dim=delta.dim)
    return DeltaGroup(there, None if rows is None else rows.to(device))


def make_case(
    seed: int,
    *,
    n: int = 3,
    out: int = 70,
    dim: int = 96,
    bits: int = 2,
    salient: int = 2,
    midrise: bool = False,
    dtype: torch.dtype = torch.float32,
    groups: int = 1,
) -> tuple[Tensor, Tensor, list[DeltaGroup], list[Tensor]]:
    """Rows are shared out at random among ``groups`` deltas and, from two on, the base; one delta takes them all."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator).to(dtype)
    y = torch.randn(n, out, generator=generator).to(dtype)
    owner = torch.randint(0, groups + 1, (n,), generator=generator)
    made = [
        make_delta(
            generator, out=out, dim=dim, bits=bits, salient=min(dim, salient), midrise=midrise or bits == 1, dtype=dtype
        )
        for _ in range(groups)
    ]
    rows = [None] if groups == 1 else [(owner == each).nonzero().flatten() for each in range(groups)]
    return x, y, [DeltaGroup(d, r) for (d, _), r in zip(made, rows, strict=True)], [matrix for _, matrix in made]


@pytest.mark.parametrize("backend", BACKENDS)
def test_adds_what_the_dense_matrix_would(backend: str) -> None:
    @settings(max_examples=EXAMPLES[backend])
    @given(
        seed=st.integers(0, 2**31 - 1),
        n=st.integers(1, 20),
        out=st.integers(1, 140),
        dim=st.integers(1, 64 if backend == "triton" else 300),  # its interpreter is slow
        bits=st.sampled_from(BITS),
        salient=st.integers(0, 9),
        midrise=st.booleans(),
        dtype=st.sampled_from(FLOATS),
        groups=st.integers(1, 4),
    )
    def run(**case: Any) -> None:
        check(backend, *make_case(**case))

    run()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_layers_and_mixed_rows(backend: str, bits: int, dtype: torch.dtype) -> None:
    wide = {"out": 72, "dim": 70} if backend == "triton" else {"out": 200, "dim": 1100}
    check(backend, *make_case(1, n=9, bits=bits, salient=8, dtype=dtype, groups=2, **wide))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_on_a_gpu(bits: int, dtype: torch.dtype) -> None:
    for n, groups in ((1, 1), (17, 1), (40, 3)):
        check(
            "triton on a GPU", *make_case(n, n=n, out=300, dim=1100, bits=bits, salient=5, dtype=dtype, groups=groups)
        )


@pytest.mark.parametrize("n", range(1, 19))
def test_every_number_of_rows(n: int) -> None:
    for backend in set(BACKENDS) - {"triton"}:
        check(backend, *make_case(n, n=n, dtype=torch.bfloat16))
        check(backend, *make_case(n, n=n, midrise=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_add(backend: str) -> None:
    kernel = get_kernel("delta_linear", backend)
    x, y, groups, _ = make_case(0, n=0)
    assert kernel(x, y, groups).shape == (0, 70)
    x, y, groups, _ = make_case(0)
    assert torch.equal(kernel(x, y.clone(), []), y)
    none = torch.empty(0, dtype=torch.int64)
    assert torch.equal(kernel(x, y.clone(), [DeltaGroup(groups[0].delta, none)]), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_float64(backend: str) -> None:
    x, y, groups, dense = make_case(4, n=5)
    check(backend, x.T.contiguous().T, y.T.contiguous().T, groups, dense)
    check(backend, x.double(), y.double(), groups, dense)


def test_the_check_catches_a_wrong_channel() -> None:
    x, y, groups, dense = make_case(5)
    dense[0] = dense[0].roll(1, dims=1)
    with pytest.raises(AssertionError):
        check("reference", x, y, groups, dense)


def test_the_reference_has_gradients() -> None:
    x, y, groups, dense = make_case(6)
    x.requires_grad_()
    get_kernel("delta_linear", "reference")(x, y, groups).sum().backward()
    assert torch.allclose(x.grad, dense[0].sum(0).float().expand_as(x), atol=1e-5)


def test_parts_that_do_not_belong_together() -> None:
    x, y, groups, _ = make_case(7)
    delta = groups[0].delta
    kernel = get_kernel("delta_linear")
    with pytest.raises(ValueError, match="does not fit x"):
        kernel(x[:, :-1], y, groups)
    with pytest.raises(ValueError, match=r"must be \[n, in\]"):
        kernel(x[:2], y, groups)
    sound = {name: getattr(delta, name) for name in ("codes", "step", "salient_index", "salient_weight")}
    numbers = {"bits": 2, "zero": 2.0, "dim": 96}
    with pytest.raises(ValueError, match="codes of a 2-bit delta"):
        PackedDelta(**{**sound, "codes": delta.codes[:, :-1]}, **numbers)
    with pytest.raises(ValueError, match="bits=5"):
        PackedDelta(**sound, **{**numbers, "bits": 5})
    with pytest.raises(TypeError, match="salient_index int32"):
        PackedDelta(**{**sound, "salient_index": delta.salient_index.long()}, **numbers)
    with pytest.raises(TypeError, match="must be floats"):
        PackedDelta(**{**sound, "step": delta.step.int()}, **numbers)

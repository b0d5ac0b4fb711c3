"""Every back end writes the same bytes, and they are those of the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.kv.engine.tree import map_tensors
from tersor.lowbit.codecs import affine_parameters, channel_scale
from tersor.lowbit.kernels import backends, get_kernel, triton_runtime, unavailable_reason
from tersor.lowbit.kernels.quantize_pack import reference
from tersor.lowbit.packing import pack_half_split

OTHERS = [
    name
    for name in backends("quantize_pack")
    if name != "reference"
    and (triton_runtime.available("cpu") if name == "triton" else unavailable_reason("quantize_pack", name) is None)
]
EXAMPLES = {"cpu": 400, "triton": 60}

Case = tuple[Tensor, Tensor, Tensor, int, Tensor | None]


def make_case(
    seed: int,
    *,
    batch: int = 2,
    heads: int = 2,
    tokens: int = 9,
    dim: int = 16,
    bits: int = 4,
    role: str = "keys",
    dtype: torch.dtype = torch.float32,
    param_dtype: torch.dtype = torch.float16,
    layout: str = "contiguous",
) -> Case:
    """Tokens with an outlier, a constant and a zero channel. ``role``: "keys", "values" or "values per head"."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, heads, tokens, dim, generator=generator) * 3
    x[..., ::7] *= 30
    x[:, :, :, 1 % dim] = 3.25
    x[:, 0, :, 2 % dim] = 0.0
    x = x.to(dtype)
    if layout == "heads last":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "strided":
        x = x.repeat_interleave(2, dim=2)[:, :, ::2].repeat_interleave(3, dim=3)[..., ::3]
    scale, weighted = None, x.float()
    if role != "keys":
        scale = channel_scale(x, param_dtype=param_dtype)
        weighted = weighted / torch.where(scale == 0, 1.0, scale.float())
    dims = {"keys": (-2,), "values": (-3, -1), "values per head": (-1,)}[role]
    minimum, step = affine_parameters(weighted, bits, dims, valid=None, param_dtype=param_dtype)
    return x, minimum, step, bits, scale


@st.composite
def cases(draw: st.DrawFn) -> Case:
    choices: dict[str, Any] = {
        "batch": st.integers(1, 3),
        "heads": st.integers(1, 3),
        "tokens": st.integers(1, 70),
        "dim": st.integers(1, 40),
        "bits": st.sampled_from([2, 3, 4, 8]),
        "role": st.sampled_from(["keys", "values", "values per head"]),
        "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
        "param_dtype": st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
        "layout": st.sampled_from(["contiguous", "heads last", "strided"]),
    }
    return make_case(draw(st.integers(0, 10**6)), **{name: draw(choice) for name, choice in choices.items()})


def by_formula(x: Tensor, minimum: Tensor, step: Tensor, bits: int, scale: Tensor | None) -> Tensor:
    """One number after the other in float64 where a quotient's rounding cannot matter, so ties are exact."""
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    minimum, step = minimum.expand(x.shape), step.expand(x.shape)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).tolist():
        at = tuple(place)
        number = x[at].float()
        if scale is not None and float(scale.expand(x.shape)[at]) != 0:
            number = number / scale.expand(x.shape)[at].float()
        if float(step[at]) != 0:
            code = round(float((number - minimum[at].float()) / step[at].float()))  # Python rounds half to even too
            codes[at] = min(max(code, 0), 2**bits - 1)
    return pack_half_split(codes, bits)


def check_same_bytes(kernel, case: Case) -> None:
    packed = kernel(*case)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed, reference.quantize_pack(*case))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("role", ["keys", "values", "values per head"])
def test_reference_is_the_formula(bits: int, role: str) -> None:
    case = make_case(bits, bits=bits, role=role, batch=1, tokens=4, dim=11)
    assert torch.equal(reference.quantize_pack(*case), by_formula(*case))


@pytest.mark.parametrize("backend", OTHERS)
def test_every_back_end_gives_the_same_bytes(backend: str) -> None:
    @settings(max_examples=EXAMPLES[backend])
    @given(case=cases())
    def check(case: Case) -> None:
        check_same_bytes(get_kernel("quantize_pack", backend), case)

    check()


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_bytes_on_a_gpu(bits: int, dtype: torch.dtype) -> None:
    for seed, role in enumerate(("keys", "values", "values per head")):
        for layout in ("contiguous", "heads last", "strided"):
            case = make_case(seed, tokens=300, dim=72, bits=bits, role=role, dtype=dtype, layout=layout)
            packed = get_kernel("quantize_pack", "triton")(*map_tensors(list(case), lambda x: x.cuda()))
            assert torch.equal(packed.cpu(), reference.quantize_pack(*case))


@pytest.mark.parametrize("backend", [*OTHERS, "reference"])
def test_halves_round_to_the_even_code(backend: str) -> None:
    x = torch.arange(8)[None, None, None].float() / 2
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    packed = get_kernel("quantize_pack", backend)(x, zero, one, 8)
    assert packed.flatten().tolist() == [0, 0, 1, 2, 2, 2, 3, 4]


def rounding_half_up(x: Tensor, minimum: Tensor, step: Tensor, bits: int, scale: Tensor | None = None) -> Tensor:
    return reference.quantize_pack(x + 1e-3 * step.float(), minimum, step, bits, scale)


def dividing_by_the_reciprocal(
    x: Tensor, minimum: Tensor, step: Tensor, bits: int, scale: Tensor | None = None
) -> Tensor:
    codes = ((x.float() - minimum.float()) * (1 / step.float())).round().clamp(0, 2**bits - 1)
    return pack_half_split(codes.masked_fill(step == 0, 0).to(torch.uint8), bits)


@pytest.mark.parametrize("broken", [rounding_half_up, dividing_by_the_reciprocal])
def test_the_check_catches(broken) -> None:
    """Numbers that lie exactly between two codes, where an ulp decides."""
    step = torch.linspace(0.1, 0.9, 50)[None, None, :, None]
    x = (torch.arange(255) + 0.5) * step
    case = x, torch.zeros_like(step), step, 8, None
    with pytest.raises(AssertionError):
        check_same_bytes(broken, case)


def test_unpackable_bits_are_refused() -> None:
    x, minimum, step, _, _ = make_case(1)
    for backend in [*OTHERS, "reference"]:
        with pytest.raises(ValueError, match="choose one of"):
            get_kernel("quantize_pack", backend)(x, minimum, step, 5)

"""Every back end sums the same rows of attention; the definition is checked against whole matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.lowbit.kernels import backends, get_kernel, triton_runtime, unavailable_reason
from tersor.lowbit.kernels.probe_sums import reference

BACKENDS = [
    name
    for name in backends("probe_sums")
    if (triton_runtime.available("cpu") if name == "triton" else unavailable_reason("probe_sums", name) is None)
]
EXAMPLES = {"cpu": 100, "triton": 10, "reference": 30}


def make_case(
    seed: int,
    *,
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    new: int = 21,
    earlier: int = 9,
    rows: int = 7,
    dim: int = 16,
    known: bool = False,
    masked: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Arguments of one call; queries lie in memory as models hand them over, and a mask is one for all or by sample."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    query = 2 * draw(batch, new, kv_heads * group, dim).transpose(1, 2)
    keys = draw(batch, kv_heads, earlier + new, dim)
    picked = torch.randperm(new, generator=generator)[: min(rows, new)].sort().values
    allowed = torch.rand(batch, len(picked), earlier + new, generator=generator) < 0.6
    return {
        "query": query.to(dtype), "keys": keys.to(dtype), "rows": picked, "scaling": dim**-0.5,
        "lse": draw(batch, kv_heads * group, new) + 4 if known else None,
        "allowed": None if masked == 0 else allowed[:1] if masked == 1 else allowed,
    }  # fmt: skip


def by_hand(case: dict[str, Any]) -> Tensor:
    """Whole matrices in float64, then the rows."""
    query, keys, rows = case["query"].double(), case["keys"].double(), case["rows"]
    group = query.shape[1] // keys.shape[1]
    scores = query @ keys.repeat_interleave(group, 1).transpose(-1, -2) * case["scaling"]
    scores = scores[:, :, rows]
    new, columns = query.shape[2], keys.shape[2]
    closed = torch.arange(columns) > rows[:, None] + columns - new
    if case["allowed"] is not None:
        closed = ~case["allowed"][:, None]
    scores = scores.masked_fill(closed, -torch.inf)
    lse = scores.logsumexp(-1) if case["lse"] is None else case["lse"].double()[:, :, rows]
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return weights.sum(2).unflatten(1, (-1, group)).mean(2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_sums_what_is_summed_by_hand(backend: str) -> None:
    @settings(max_examples=EXAMPLES[backend], deadline=None)
    @given(
        seed=st.integers(0, 10**6), batch=st.integers(1, 2), kv_heads=st.integers(1, 3), group=st.integers(1, 3),
        new=st.integers(1, 90), earlier=st.integers(0, 70), rows=st.integers(1, 90), dim=st.sampled_from([8, 16, 40]),
        known=st.booleans(), masked=st.integers(0, 2),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    )  # fmt: skip
    def check(**shape: Any) -> None:
        case = make_case(**shape)
        sums = get_kernel("probe_sums", backend)(**case)
        expected = by_hand(case)
        assert sums.dtype == (torch.float64 if shape["dtype"] == torch.float64 else torch.float32)
        assert float((sums - expected).abs().max()) <= 2e-5 * float(expected.abs().max().clamp_min(1e-3))

    check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [0, 2])
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # numpy's, in Triton's interpreter
def test_a_row_that_holds_nan_or_sees_nothing_gives_nothing(backend: str, masked: int) -> None:
    case = make_case(0, masked=masked, rows=6)
    if masked:
        case["allowed"][1, 2] = False
    else:
        case["query"][1, 3, case["rows"][2]] = torch.nan
        case["keys"][0, 1, 25] = torch.inf
    expected = reference.probe_sums(**case)
    sums = get_kernel("probe_sums", backend)(**case)
    assert torch.isfinite(sums).all()
    torch.testing.assert_close(sums, expected)
    assert float(sums.sum()) < 2 * 2 * len(case["rows"]) - 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_sum_to_one(backend: str) -> None:
    case = make_case(3, rows=9)
    sums = get_kernel("probe_sums", backend)(**case)
    torch.testing.assert_close(sums.sum(-1), torch.full((2, 2), 9.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_and_soft_caps_are_left_to_the_reference(backend: str) -> None:
    case = make_case(1)
    case["query"].requires_grad_()
    get_kernel("probe_sums", backend)(**case).square().sum().backward()
    assert float(case["query"].grad.abs().sum()) > 0
    capped = make_case(1) | {"softcap": 0.5}
    torch.testing.assert_close(get_kernel("probe_sums", backend)(**capped), reference.probe_sums(**capped))
    assert not torch.allclose(get_kernel("probe_sums", backend)(**capped), reference.probe_sums(**make_case(1)))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_the_order_of_sums_alone(threads: int) -> None:
    case, before = make_case(5, batch=1, kv_heads=1, group=3, new=80, rows=50), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        torch.testing.assert_close(get_kernel("probe_sums")(**case).double(), by_hand(case), rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_lse_gives_exact_entries_for_any_columns() -> None:
    case = make_case(2, earlier=0)
    scores = case["query"] @ case["keys"].repeat_interleave(2, 1).transpose(-1, -2) * case["scaling"]
    allowed = torch.ones(1, 21, 21, dtype=torch.bool).tril()
    scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    part = reference.attention_rows(
        case["query"], case["keys"][:, :, 8:], allowed[..., 8:], scaling=case["scaling"], lse=scores.logsumexp(-1)
    )
    torch.testing.assert_close(part, scores.softmax(-1).unflatten(1, (-1, 2)).mean(2)[..., 8:])


def test_tiles_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(4, masked=2)
    whole = reference.probe_sums(**case)
    monkeypatch.setattr(reference, "TILE_NUMBERS", 2 * 4 * 30 * 3)
    torch.testing.assert_close(reference.probe_sums(**case), whole)

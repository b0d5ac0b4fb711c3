"""Every back end writes the attention that new tokens give to a window, and forgets nothing that was there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.lowbit.kernels import backends, get_kernel, triton_runtime, unavailable_reason
from tersor.lowbit.kernels.window_scores import reference

BACKENDS = [
    name
    for name in backends("window_scores")
    if (triton_runtime.available("cpu") if name == "triton" else unavailable_reason("window_scores", name) is None)
]
EXAMPLES = {"cpu": 200, "triton": 40, "reference": 50}


def make_case(
    seed: int,
    *,
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    queries: int = 1,
    dim: int = 16,
    tokens: int = 20,
    free: int = 5,
    scopes: int = 1,
    masked: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Arguments of one call; some rows of ``steps`` hold older steps, and the rest of the sequence is 7 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    query, keys = draw(batch, kv_heads * group, queries, dim), draw(batch, kv_heads, tokens + free, dim)
    steps = torch.zeros(batch, 1 + 4, scopes + 1, tokens + free)
    steps[:, :3, :, : tokens - queries] = draw(batch, 3, scopes + 1, tokens - queries).abs()
    lse = draw(batch, kv_heads * group, queries) + 6
    mask = torch.rand(batch if seed % 2 else 1, 1, queries, tokens + 7, generator=generator) < 0.7 if masked else None
    # The second row holds an older step, the fourth is free.
    places = [(index, (2, 4, 1, 3)[index], int(index in (0, 2))) for index in range(queries)]
    return {
        "query": query.to(dtype), "keys": keys.to(dtype), "lse": lse, "steps": steps, "places": places,
        "tokens": tokens, "scaling": dim**-0.5, "mask": mask,
    }  # fmt: skip


def run(kernel: Any, case: dict[str, Any]) -> Tensor:
    steps = case["steps"].clone()
    kernel(**case | {"steps": steps})
    return steps


def by_hand(case: dict[str, Any]) -> Tensor:
    """The same, number by number: whole rows of attention whose other tokens only show in ``lse``."""
    query, keys, tokens = case["query"].float(), case["keys"].float(), case["tokens"]
    steps = case["steps"].clone()
    batch, heads, queries, _ = query.shape
    kv_heads, scopes = keys.shape[1], steps.shape[2] - 1
    for index, row, fold in case["places"]:
        steps[:, 0] += steps[:, row] * fold
        steps[:, row] = 0.0
        for b in range(batch):
            for column in range(tokens - queries + index + 1):
                steps[b, row, scopes, column] = 1.0
                mask = case["mask"]
                if mask is not None and not mask[b % len(mask), 0, index, mask.shape[-1] - tokens + column]:
                    continue
                for head in range(heads):
                    own = head * kv_heads // heads
                    score = query[b, head, index] @ keys[b, own, column] * case["scaling"]
                    weight = (score - case["lse"][b, head, index]).exp()
                    steps[b, row, 0 if scopes == 1 else own, column] += weight * scopes / heads
    return steps


def check(backend: str, case: dict[str, Any]) -> None:
    torch.testing.assert_close(run(get_kernel("window_scores", backend), case), by_hand(case), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scopes", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_attention_that_the_queries_give(backend: str, scopes: int, masked: bool) -> None:
    check(backend, make_case(1, queries=3, scopes=scopes, masked=masked))


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads, queries = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    return make_case(
        draw(st.integers(0, 10**6)),
        batch=draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        group=draw(st.integers(1, 4)),
        queries=queries,
        dim=draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 80, 128]))),
        tokens=draw(st.integers(queries, 40)),
        free=draw(st.integers(0, 9)),
        scopes=draw(st.sampled_from([1, kv_heads])),
        masked=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
    )


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_random_cases(backend: str) -> None:
    @settings(max_examples=EXAMPLES[backend])
    @given(case=cases())
    def compare(case: dict[str, Any]) -> None:
        kernel = get_kernel("window_scores", backend)
        torch.testing.assert_close(run(kernel, case), run(reference.window_scores, case), rtol=1e-3, atol=1e-5)

    compare()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_saw_nothing_gives_nothing(backend: str) -> None:
    case = make_case(2, masked=True)
    case["mask"] = torch.zeros(2, 1, 1, 27, dtype=torch.bool)
    case["lse"] = torch.full_like(case["lse"], -torch.inf)
    steps = run(get_kernel("window_scores", backend), case)
    assert not bool(steps[:, 2, 0].any()) and bool(steps.isfinite().all())


def without_folding(**case: Any) -> None:
    reference.window_scores(**case | {"places": [(index, row, 0) for index, row, _ in case["places"]]})


def without_the_rest_of_the_row(**case: Any) -> None:
    """Rows normalized within the window."""
    tokens, queries = case["tokens"], case["query"].shape[2]
    scores = case["query"].float() @ case["keys"][:, :, :tokens].float().repeat_interleave(2, 1).transpose(-1, -2)
    seen = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    lse = (scores * case["scaling"]).masked_fill(~seen, -torch.inf).logsumexp(-1)
    reference.window_scores(**case | {"lse": lse})


@pytest.mark.parametrize("broken", [without_folding, without_the_rest_of_the_row])
def test_the_check_catches(broken: Any) -> None:
    case = make_case(3, queries=2)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run(broken, case), by_hand(case), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    case = make_case(4, queries=3, kv_heads=4, dim=128, tokens=100, masked=True, dtype=dtype)
    expected = run(reference.window_scores, case)
    there = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in case.items()}
    torch.testing.assert_close(run(get_kernel("window_scores", "triton"), there).cpu(), expected, rtol=2e-3, atol=1e-4)

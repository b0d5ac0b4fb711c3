"""One attention call: which attention answers it, and what its masks mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2 import modeling_gemma2

from tersor.kv.engine.call import AttentionCall, boolean_mask, causal_rows

CPU = torch.device("cpu")


class Layer(nn.Module):
    """As much of a model's attention layer as attention functions read; two query heads share a key head."""

    num_key_value_groups = 2
    is_causal = True


class GemmaLayer(Layer):
    """A layer whose module brings an eager attention of its own."""

    __module__ = modeling_gemma2.__name__


def call(queries: int, columns: int, mask: Tensor | None = None, module: nn.Module | None = None, **options: Any):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, tokens, 8, generator=generator)
        for heads, tokens in ((4, queries), (2, columns), (2, columns))
    )
    return AttentionCall((module or Layer()).eval(), query, key, value, mask, 0.3, options=options)


def by_hand(asked: AttentionCall, allowed: Tensor) -> Tensor:
    """The attention of every query by itself, over the columns that it may look at."""
    batch, heads, queries, _ = asked.query.shape
    out = torch.zeros(batch, queries, heads, 8)
    for sample in range(batch):
        for head in range(heads):
            for row in range(queries):
                seen = allowed[sample % len(allowed), 0, row].nonzero()[:, 0]
                keys, values = (each[sample, head // 2, seen] for each in (asked.key, asked.value))
                scores = keys @ asked.query[sample, head, row] * asked.scaling
                if cap := asked.options.get("softcap"):
                    scores = cap * torch.tanh(scores / cap)
                out[sample, row, head] = scores.softmax(0) @ values
    return out


def padded(queries: int, columns: int) -> Tensor:
    """The last queries see all columns before them, but for the first two columns of the second sample."""
    allowed = causal_rows(queries, columns, CPU)[:, None].repeat(2, 1, 1, 1)
    allowed[1, ..., :2] = False
    return allowed


@pytest.mark.parametrize(("queries", "columns"), [(1, 1), (1, 5), (3, 5), (5, 5)])
def test_causal_rows_are_the_last_queries_of_the_sequence(queries: int, columns: int) -> None:
    expected = [[column <= columns - queries + row for column in range(columns)] for row in range(queries)]
    assert causal_rows(queries, columns, CPU).tolist() == [expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_additive_mask_is_closed_at_the_bottom_alone(dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    mask = torch.tensor([0.0, -100.0, lowest, -float("inf")], dtype=dtype)
    assert boolean_mask(mask).tolist() == [True, True, False, False]
    as_it_is = torch.tensor([True, False])
    assert boolean_mask(as_it_is) is as_it_is


def test_where_a_query_may_look() -> None:
    assert call(3, 5).open is None
    allowed = padded(3, 5)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    assert torch.equal(call(3, 5, allowed).open, allowed)
    assert torch.equal(call(3, 5, additive).open, allowed)


def test_options_count_as_given_if_the_model_uses_them() -> None:
    asked = call(1, 2, softcap=None, output_attentions=False, s_aux=0.0, position_ids=torch.zeros(1))
    assert asked.given("softcap", "output_attentions", "s_aux", "position_ids", "absent") == ["s_aux", "position_ids"]


def test_probes_get_scale_and_cap() -> None:
    asked, lse = call(3, 5, softcap=20.0), torch.zeros(2, 4, 3)
    found = asked.queries(lse)
    assert found.query is asked.query and found.lse is lse
    assert (found.scaling, found.softcap) == (0.3, 20.0)
    assert (call(3, 5).queries().softcap, call(3, 5).queries().lse) == (None, None)


@pytest.mark.parametrize("queries", [1, 5])
def test_plain_attention_is_the_library_s(queries: int) -> None:
    asked = call(queries, 5)
    torch.testing.assert_close(asked.dense()[0], by_hand(asked, causal_rows(queries, 5, CPU)[:, None]))
    masked = call(queries, 5, padded(queries, 5))
    torch.testing.assert_close(masked.dense()[0], by_hand(masked, padded(queries, 5)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries", [1, 3])
def test_what_sdpa_lacks_goes_to_the_model_s_own_attention(queries: int, masked: bool) -> None:
    """An eager function adds its mask, so a missing or boolean one must have become numbers."""
    allowed = padded(queries, 5) if masked else causal_rows(queries, 5, CPU)[:, None]
    asked = call(queries, 5, allowed if masked else None, GemmaLayer(), softcap=0.5)
    out, weights = asked.dense()
    torch.testing.assert_close(out, by_hand(asked, allowed))
    assert weights is not None and not weights.masked_select(~allowed).any()
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    as_given = call(queries, 5, additive, GemmaLayer(), softcap=0.5)
    wanted = modeling_gemma2.eager_attention_forward(
        as_given.module, as_given.query, as_given.key, as_given.value, additive, scaling=0.3, softcap=0.5
    )
    assert torch.equal(as_given.dense()[0], wanted[0])


def test_a_model_without_eager_attention_is_told() -> None:
    with pytest.raises(NotImplementedError, match=r"Layer asks for \['softcap'\], which SDPA lacks"):
        call(1, 5, softcap=30.0).dense()


@pytest.mark.parametrize("module", [Layer(), GemmaLayer()])
@pytest.mark.parametrize("queries", [1, 2, 7])
def test_queries_without_a_mask_are_the_last_tokens_and_see_all_before_them(module: nn.Module, queries: int):
    whole = call(12, 12, module=module)
    late = replace(whole, query=whole.query[:, :, -queries:])
    torch.testing.assert_close(late.dense()[0], whole.dense()[0][:, -queries:])

"""Attention among the chosen tokens, on one layer and on whole models."""

from __future__ import annotations

import math

import pytest
import torch
from kv_driver import (
    DIM,
    asked,
    kept_rows,
    naive,
    prefill,
    uneven,
)
from tiny_models import model, prompt
from torch import Tensor

from tersor.kv.engine.call import AttentionCall, causal_rows
from tersor.kv.engine.state import ForwardState
from tersor.kv.prefill import sparse as sparse_prefill
from tersor.kv.prefill.sparse import SparsePrefill
from tersor.kv.selection.base import Chosen
from tersor.kv.selection.probes import Queries, probe_scores
from tersor.kv.selection.ratio import SaliencySelection
from tersor.kv.zipvl import ZipVL
from tersor.lowbit.kernels.probe_sums.reference import attention_rows

SPARSE = ZipVL(tau=0.8, min_tokens=0)


def dense(qkv) -> Tensor:
    return asked(qkv).dense()[0]


@pytest.mark.parametrize("policy", ["evict", "quantize", "keep"])
@pytest.mark.parametrize("mode", ["drop", "compute"])
def test_tau_of_one_is_dense_and_probes_nothing(policy, mode, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("nothing to probe")

    monkeypatch.setattr(Queries, "sums", refuse)
    qkv = uneven(2, 50)
    output, _, state = prefill(ZipVL(tau=1.0, policy=policy, query_mode=mode, min_tokens=0), qkv)
    assert torch.equal(output, dense(qkv))
    assert state.records[0].skipped == "nothing to leave out"


@pytest.mark.parametrize(("first", "recent"), [(0, 1), (0, 5), (3, 1)])
def test_one_hot_attention_keeps_one_token_and_the_protected(first: int, recent: int) -> None:
    query, keys, values = uneven(1, 40)
    direction = torch.ones(DIM)
    keys[:, :, 0] += 1e3 * direction
    recipe = ZipVL(min_tokens=0, protect_first=first, protect_recent=recent)
    _, layer, state = prefill(recipe, (query.abs(), keys, values))
    assert kept_rows(state) == [sorted({0, *range(first), *range(40 - recent, 40)})]
    assert [group.positions.shape[-1] for group in layer.segments[0].groups] == [len(kept_rows(state)[0])]


@pytest.mark.parametrize("pad", [0, 7])
def test_output_is_attention_among_the_kept_tokens_and_zero_elsewhere(pad: int) -> None:
    qkv = uneven(1, 45)
    allowed = causal_rows(45, 45, torch.device("cpu"))[0].clone()
    allowed[:, :pad] = False
    output, _, state = prefill(ZipVL(tau=0.8, min_tokens=0), qkv, allowed[None, None] if pad else None)
    kept = kept_rows(state)[0]
    assert pad <= kept[0]
    assert 5 < len(kept) < 38 - pad
    others = sorted(set(range(45)) - set(kept))
    torch.testing.assert_close(output[0].double(), naive(qkv, kept, kept, allowed), atol=1e-5, rtol=1e-5)
    assert (output[0, others] == 0).all()


def test_computed_queries_see_the_kept_keys_only() -> None:
    qkv = uneven(2, 45)
    allowed = causal_rows(45, 45, torch.device("cpu"))[0].clone()
    recipe = ZipVL(tau=0.6, min_tokens=0, query_mode="compute")
    for mask in (None, allowed[None, None].expand(2, 1, -1, -1)):
        output, _, state = prefill(recipe, qkv, mask)
        for row, kept in enumerate(kept_rows(state)):
            own = tuple(x[row : row + 1] for x in qkv)
            expected = naive(own, kept, list(range(45)), allowed)
            torch.testing.assert_close(output[row].double(), expected, atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_no_kept_key_gets_zero() -> None:
    qkv, kept = uneven(1, 20), [6, 9, 15]
    mask = causal_rows(20, 20, torch.device("cpu"))[:, None]
    for each in (None, mask):
        output = sparse_prefill.attend_to(asked(qkv, each), Chosen(torch.tensor([[kept]]), None))
        torch.testing.assert_close(
            output[0].double(), naive(qkv, kept, list(range(20)), mask[0, 0]), atol=1e-5, rtol=1e-5
        )
        assert (output[0, :6] == 0).all()


def test_additive_masks_mean_the_same() -> None:
    qkv = uneven(2, 30)
    mask = causal_rows(30, 30, torch.device("cpu"))[:, None].repeat(2, 1, 1, 1)
    mask[1, ..., :9] = False
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for mode in ("drop", "compute"):
        recipe = ZipVL(tau=0.7, min_tokens=0, query_mode=mode)
        (one, _, first), (other, _, second) = prefill(recipe, qkv, mask), prefill(recipe, qkv, additive)
        assert kept_rows(first) == kept_rows(second)
        torch.testing.assert_close(one, other)


def test_scores_are_column_sums_of_the_probed_rows() -> None:
    qkv = uneven(2, 50)
    rows = torch.tensor([3, 20, 48, 49])
    sums, counts = probe_scores(asked(qkv).queries(), qkv[1], None, None, lambda n: rows, per_head=False)
    call = asked(qkv)
    matrix = attention_rows(call.query, qkv[1], causal_rows(50, 50, qkv[0].device), scaling=call.scaling).mean(1)
    torch.testing.assert_close(sums[:, 0], matrix[:, rows].sum(1))
    assert counts[0].tolist() == [sum(j <= int(i) for i in rows) for j in range(50)]


def padded(lengths: list[int], side: str) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, list[slice]]:
    """A batch of prompts of ``lengths`` with padding at ``side``, its mask, and where each row's own tokens are."""
    total = max(lengths)
    places = [slice(total - n, total) if side == "left" else slice(0, n) for n in lengths]
    mask = causal_rows(total, total, torch.device("cpu"))[:, None].repeat(len(lengths), 1, 1, 1)
    for row, place in enumerate(places):
        real = torch.zeros(total, dtype=torch.bool)
        real[place] = True
        mask[row] &= real
    return uneven(len(lengths), total), mask, places


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["drop", "compute"])
@pytest.mark.parametrize("min_tokens", [0, 50])
def test_rows_of_a_batch_are_what_they_are_alone(side: str, mode, min_tokens: int) -> None:
    recipe = ZipVL(tau=0.8, min_tokens=min_tokens, query_mode=mode, probe_recent=20, probe_random=8)
    qkv, mask, places = padded([37, 90, 0], side)
    output, layer, state = prefill(recipe, qkv, mask)
    assert torch.isfinite(output).all()
    assert (output[2] == 0).all()
    for row, place in enumerate(places[:2]):
        own = tuple(x[row : row + 1, :, place] for x in qkv)
        alone, _, alone_state = prefill(recipe, own)
        assert [i - place.start for i in kept_rows(state)[row]] == kept_rows(alone_state)[0]
        torch.testing.assert_close(output[row, place], alone[0], atol=1e-5, rtol=1e-5)
        assert len(kept_rows(state)[row]) == (37 if row == 0 and min_tokens else len(kept_rows(alone_state)[0]))
    group = layer.segments[0].groups[0]
    assert group.valid[:, 0].sum(-1).tolist() == [len(row) for row in kept_rows(state)]


def test_the_batch_check_catches_probes_among_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_prefill, "real_tokens", lambda call: None)
    with pytest.raises((AssertionError, UserWarning)):
        test_rows_of_a_batch_are_what_they_are_alone("left", "drop", 0)


def test_short_prompts_are_read_densely_and_stay_whole() -> None:
    qkv = uneven(1, 50)
    output, layer, state = prefill(ZipVL(tau=0.5, min_tokens=51), qkv)
    assert torch.equal(output, dense(qkv))
    assert state.records[0].skipped == "short"
    assert layer.waiting == 50
    assert prefill(ZipVL(tau=0.5, min_tokens=50), qkv)[2].records[0].skipped is None


def test_the_library_is_given_p_by_p_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, shapes, library = uneven(1, 80), [], AttentionCall.dense

    def counting(call: AttentionCall):
        shapes.append((call.query.shape[2], call.key.shape[2]))
        return library(call)

    monkeypatch.setattr(AttentionCall, "dense", counting)
    for mode in ("drop", "compute"):
        method = ZipVL(tau=0.8, min_tokens=0, query_mode=mode).method()
        state = ForwardState(method, frozenset({0}))
        method.prefill.attend(asked(qkv, state=state))
    p = len(kept_rows(state)[0])
    assert shapes == [(p, p), (80, p)]


def test_scores_that_are_not_finite_leave_the_layer_dense() -> None:
    query, keys, values = uneven(1, 40)
    keys[0, 0, 5, 3] = math.nan
    with pytest.warns(UserWarning, match="layer 0: attention scores hold NaN"):
        output, layer, state = prefill(ZipVL(tau=0.5, min_tokens=0), (query, keys, values))
    torch.testing.assert_close(output, dense((query, keys, values)), equal_nan=True)
    assert state.records[0].skipped == "scores not finite"
    assert layer.segments[0].groups[0].positions.shape[-1] == 40
    with pytest.raises(ValueError, match="layer 0: attention scores"):
        prefill(ZipVL(tau=0.5, min_tokens=0, check_finite=True), (query, keys, values))


def test_half_precision_scores_do_not_overflow() -> None:
    query, keys, values = uneven(1, 64)
    own = (200 * query).half(), (200 * keys).half(), values.half()
    output, _, state = prefill(ZipVL(tau=0.9, min_tokens=0), own)
    assert torch.isfinite(output).all()
    assert state.records[0].skipped is None


def test_dropout_acts_among_the_kept_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, seen = uneven(1, 60), []
    library = AttentionCall.dense

    def noting(call: AttentionCall):
        seen.append(call.dropout)
        return library(call)

    monkeypatch.setattr(AttentionCall, "dense", noting)
    ZipVL(tau=0.7, min_tokens=0).method().prefill.attend(asked(qkv, dropout=0.25))
    assert seen == [0.25]


def test_an_unselected_token_passes_by_residual_and_mlp_alone() -> None:
    net = model("llama")
    seen: list[tuple[Tensor, Tensor]] = []
    layer = net.model.layers[0]
    handle = layer.register_forward_hook(lambda m, args, kwargs, out: seen.append((args[0], out)), with_kwargs=True)
    with SPARSE.on(net) as session, torch.no_grad():
        net(prompt(1, 60))
        kept = session.stats.kept[0][0].tolist()
    handle.remove()
    before, after = seen[0][0], seen[0][1] if isinstance(seen[0][1], Tensor) else seen[0][1][0]
    with torch.no_grad():
        alone = before + layer.mlp(layer.post_attention_layernorm(before))
    others = sorted(set(range(60)) - set(kept))
    assert len(others) > 10
    assert torch.equal(after[0, others], alone[0, others])
    assert not torch.equal(after[0, kept], alone[0, kept])


def test_padding_on_either_side_changes_no_row() -> None:
    net = model("qwen2")
    ids, lengths = prompt(2, 90), (37, 90)
    for side in ("left", "right"):
        mask = torch.ones_like(ids)
        places = [slice(90 - n, 90) if side == "left" else slice(0, n) for n in lengths]
        mask[0] = 0
        mask[0, places[0]] = 1
        position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
        with SPARSE.on(net) as session, torch.no_grad():
            together = net(ids, attention_mask=mask, position_ids=position_ids).logits
            kept = session.stats.kept
            assert session.stats.tokens == lengths
            for row, place in enumerate(places):
                alone = net(ids[row : row + 1, place]).logits
                torch.testing.assert_close(together[row, place], alone[0], atol=1e-4, rtol=1e-4)
                for many, one in zip(kept, session.stats.kept, strict=True):
                    assert (many[row] - place.start).tolist() == one[0].tolist()


def test_selections_by_head_are_refused() -> None:
    with pytest.raises(ValueError, match="one set of tokens for all heads"):
        SparsePrefill(selection=SaliencySelection(ratio=0.5, scope="kv_head"))

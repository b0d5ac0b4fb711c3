"""ZipVL on one layer: which tokens are chosen, what attention makes of them, what the cache stores (spec 6.1)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.kv.engine.attention import tersor_attention
from tersor.kv.engine.call import AttentionCall, causal_rows
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.engine.state import STATE, ForwardState
from tersor.kv.prefill import sparse as sparse_prefill
from tersor.kv.prefill.sparse import SparsePrefill
from tersor.kv.selection.base import Chosen, Waiting
from tersor.kv.selection.mass import MassSelection, smallest_set
from tersor.kv.selection.probes import ProbeScores, Queries, attention_rows, probe_scores
from tersor.kv.selection.ratio import RecentSelection
from tersor.kv.zipvl import ZipVL
from tersor.lowbit.bytes import segment_bytes

HEADS, KV_HEADS, DIM = 8, 2, 16
SCALE = DIM**-0.5


class Attention(nn.Module):
    """What a model's attention module shows to the attention function."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="tersor")
        self.num_key_value_groups = HEADS // KV_HEADS
        self.is_causal, self.layer_idx = True, 0
        self.eval()


MODULE = Attention()


def tensors(batch: int, tokens: int, seed: int = 0, sharpness: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values ``[batch, heads, tokens, dim]`` with uneven attention."""
    generator = torch.Generator().manual_seed(seed)
    query, keys, values = (
        torch.randn(batch, heads, tokens, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return sharpness * query, keys, values


def prefill(recipe: ZipVL, qkv, mask: Tensor | None = None) -> tuple[Tensor, CompressedLayer, ForwardState]:
    """One prompt through one layer; returns the output ``[batch, tokens, heads, dim]``."""
    method = recipe.method()
    layer, state = CompressedLayer(method, 0), ForwardState(method, frozenset({0}))
    keys, values = layer.update(*qkv[1:])
    output, _ = tersor_attention(MODULE, qkv[0], keys, values, mask, scaling=SCALE, **{STATE: state})
    return output, layer, state


def decode(layer: CompressedLayer, qkv, start: int, stop: int) -> list[Tensor]:
    outputs = []
    for i in range(start, stop):
        query, keys, values = (x[:, :, i : i + 1] for x in qkv)
        outputs.append(tersor_attention(MODULE, query, *layer.update(keys, values), None, scaling=SCALE)[0])
    return outputs


def kept_rows(state: ForwardState) -> list[list[int]]:
    kept = state.records[0].kept
    return [
        index[slice(None) if kept.valid is None else kept.valid[row, 0]].tolist()
        for row, index in enumerate(kept.index[:, 0])
    ]


def asked(qkv, mask: Tensor | None = None, **others) -> AttentionCall:
    return AttentionCall(MODULE, *qkv, mask, SCALE, **others)


def dense(qkv) -> Tensor:
    return asked(qkv).dense()[0]


def choose(sums: Tensor, counts: Tensor | None = None, **settings) -> list[list[int]]:
    """Tokens that `MassSelection` picks by the accumulated attention ``[batch, tokens]``."""
    counts = torch.ones_like(sums) if counts is None else counts
    waiting = Waiting(torch.zeros(*sums.shape[:1], 1, sums.shape[1], 1), None, ProbeScores(sums[:, None], counts), 0, 0)
    return [row.tolist() for row in MassSelection(**settings).choose(waiting)[0].index[:, 0]]


# -- property 1: tau = 1 is dense ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["evict", "quantize", "keep"])
@pytest.mark.parametrize("mode", ["drop", "compute"])
def test_tau_of_one_is_dense_and_probes_nothing(policy, mode, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("nothing to probe")

    monkeypatch.setattr("tersor.kv.selection.probes.attention_rows", refuse)
    qkv = tensors(2, 50)
    output, _, state = prefill(ZipVL(tau=1.0, policy=policy, query_mode=mode, min_tokens=0), qkv)
    assert torch.equal(output, dense(qkv))
    assert state.records[0].skipped == "nothing to leave out"


# -- property 2: minimality ----------------------------------------------------------------------------------------


def test_the_set_is_the_smallest_that_holds_the_mass() -> None:
    generator = torch.Generator().manual_seed(3)
    sums = torch.rand(20, 77, generator=generator) ** 6
    ordered = sums.double().sort(-1, descending=True).values
    before = torch.zeros(20, dtype=torch.int64)
    for tau in (0.01, 0.3, 0.5, 0.9, 0.96, 0.975, 0.999):
        p = smallest_set(sums, tau)
        needed = tau * ordered.sum(-1)
        for row in range(20):
            assert ordered[row, : p[row]].sum() >= needed[row] * (1 - 1e-12)
            assert ordered[row, : p[row] - 1].sum() < needed[row]
        assert (p >= before).all()
        before = p


# -- property 3: a case with a closed form -------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize("tau", [0.5, 0.9, 0.975])
def test_uniform_attention_has_harmonic_scores(n: int, tau: float) -> None:
    """Zero queries, every row a probe: A_ij = 1/(i+1), so a_j = H_n - H_j, c_j = n - j."""
    qkv = tensors(1, n)
    output, _, state = prefill(ZipVL(tau=tau, probe="all", min_tokens=0), (torch.zeros_like(qkv[0]), *qkv[1:]))
    harmonic = [sum(1 / (i + 1) for i in range(j)) for j in range(n + 1)]
    a = [harmonic[n] - harmonic[j] for j in range(n)]
    p = next(m for m in range(1, n + 1) if sum(a[:m]) >= tau * n - 1e-9)  # a falls with j
    normalized = [a[j] / (n - j) for j in range(n)]
    best = sorted(range(n), key=lambda j: -normalized[j])[:p]
    assert kept_rows(state) == [sorted({*best, n - 1})]
    assert state.records[0].mass[0] == pytest.approx(sum(a[j] for j in {*best, n - 1}) / n, rel=1e-5)
    assert torch.isfinite(output).all()


# -- property 4: one token gets everything -------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "recent"), [(0, 1), (0, 5), (3, 1)])
def test_one_hot_attention_keeps_one_token_and_the_protected(first: int, recent: int) -> None:
    query, keys, values = tensors(1, 40)
    direction = torch.ones(DIM)
    keys[:, :, 0] += 1e3 * direction
    recipe = ZipVL(min_tokens=0, protect_first=first, protect_recent=recent)
    _, layer, state = prefill(recipe, (query.abs(), keys, values))
    assert kept_rows(state) == [sorted({0, *range(first), *range(40 - recent, 40)})]
    assert [group.positions.shape[-1] for group in layer.segments[0].groups] == [len(kept_rows(state)[0])]


def test_counting_is_by_raw_attention_and_choosing_by_normalized() -> None:
    sums = torch.tensor([[6.0, 3.0, 0.5, 0.5]])
    counts = torch.tensor([[12.0, 12.0, 1.0, 1.0]])
    assert choose(sums, counts, tau=0.85) == [[0, 2, 3]]  # p = 2: 3 is forced, 0.5, 0.25 < 0.5 = 0.5; earlier first
    assert choose(sums, counts, tau=0.85, select_by="raw") == [[0, 1, 3]]
    assert choose(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), tau=0.5) == [[0, 1, 3]]  # ties keep the earlier token


# -- property 5: reference ----------------------------------------------------------------------------------------


def naive(qkv, kept: list[int], queries: list[int], allowed: Tensor) -> Tensor:
    """Attention of ``queries`` to ``kept`` under the mask ``allowed`` ``[tokens, tokens]``, one number at a time."""
    query, keys, values = (x.double() for x in qkv)
    output = torch.zeros(query.shape[2], HEADS, DIM, dtype=torch.float64)
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        for i in queries:
            seen = [j for j in kept if allowed[i, j]]
            if not seen:
                continue
            scores = torch.stack([(query[0, head, i] * keys[0, group, j]).sum() * SCALE for j in seen])
            output[i, head] = (scores.softmax(0)[:, None] * values[0, group, seen]).sum(0)
    return output


@pytest.mark.parametrize("pad", [0, 7])
def test_output_is_attention_among_the_kept_tokens_and_zero_elsewhere(pad: int) -> None:
    qkv = tensors(1, 45)
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
    qkv = tensors(2, 45)
    allowed = causal_rows(45, 45, torch.device("cpu"))[0].clone()
    recipe = ZipVL(tau=0.6, min_tokens=0, query_mode="compute")
    for mask in (None, allowed[None, None].expand(2, 1, -1, -1)):
        output, _, state = prefill(recipe, qkv, mask)
        for row, kept in enumerate(kept_rows(state)):
            own = tuple(x[row : row + 1] for x in qkv)
            expected = naive(own, kept, list(range(45)), allowed)
            torch.testing.assert_close(output[row].double(), expected, atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_no_kept_key_gets_zero() -> None:
    qkv, kept = tensors(1, 20), [6, 9, 15]
    mask = causal_rows(20, 20, torch.device("cpu"))[:, None]
    for each in (None, mask):
        output = sparse_prefill.attend_to(asked(qkv, each), Chosen(torch.tensor([[kept]]), None))
        torch.testing.assert_close(
            output[0].double(), naive(qkv, kept, list(range(20)), mask[0, 0]), atol=1e-5, rtol=1e-5
        )
        assert (output[0, :6] == 0).all()


def test_additive_masks_mean_the_same() -> None:
    qkv = tensors(2, 30)
    mask = causal_rows(30, 30, torch.device("cpu"))[:, None].repeat(2, 1, 1, 1)
    mask[1, ..., :9] = False
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for mode in ("drop", "compute"):
        recipe = ZipVL(tau=0.7, min_tokens=0, query_mode=mode)
        (one, _, first), (other, _, second) = prefill(recipe, qkv, mask), prefill(recipe, qkv, additive)
        assert kept_rows(first) == kept_rows(second)
        torch.testing.assert_close(one, other)


def test_scores_are_column_sums_of_the_probed_rows() -> None:
    qkv = tensors(2, 50)
    rows = torch.tensor([3, 20, 48, 49])
    sums, counts = probe_scores(asked(qkv).queries(), qkv[1], None, None, lambda n: rows, per_head=False)
    matrix = attention_rows(asked(qkv).queries(), qkv[1], causal_rows(50, 50, qkv[0].device)).mean(1)
    torch.testing.assert_close(sums[:, 0], matrix[:, rows].sum(1))
    assert counts[0].tolist() == [sum(j <= int(i) for i in rows) for j in range(50)]


# -- property 7: batches -------------------------------------------------------------------------------------------


def padded(lengths: list[int], side: str) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, list[slice]]:
    """A batch of prompts of ``lengths`` with padding at ``side``, its mask, and where each row's own tokens are."""
    total = max(lengths)
    places = [slice(total - n, total) if side == "left" else slice(0, n) for n in lengths]
    mask = causal_rows(total, total, torch.device("cpu"))[:, None].repeat(len(lengths), 1, 1, 1)
    for row, place in enumerate(places):
        real = torch.zeros(total, dtype=torch.bool)
        real[place] = True
        mask[row] &= real
    return tensors(len(lengths), total), mask, places


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
    with pytest.raises(AssertionError):
        test_rows_of_a_batch_are_what_they_are_alone("left", "drop", 0)


# -- property 8, decoding, and later chunks ------------------------------------------------------------------------


def test_decoding_reads_kept_and_generated_tokens() -> None:
    qkv = tensors(1, 60)
    _, layer, state = prefill(ZipVL(tau=0.8, min_tokens=0), tuple(x[:, :, :50] for x in qkv))
    kept = kept_rows(state)[0]
    outputs = decode(layer, qkv, 50, 60)
    assert layer.get_seq_length() == 60
    assert layer.get_mask_sizes(1) == (61, 0)
    for i, output in zip(range(50, 60), outputs, strict=True):
        allowed = torch.ones(60, 60, dtype=torch.bool).tril()
        expected = naive(qkv, [*kept, *range(50, i + 1)], [i], allowed)[i]
        torch.testing.assert_close(output[0, 0].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", ["evict", "keep"])
def test_generated_tokens_are_never_compressed(policy) -> None:
    qkv = tensors(1, 400)
    _, layer, _ = prefill(ZipVL(tau=0.8, min_tokens=0, policy=policy), tuple(x[:, :, :50] for x in qkv))
    decode(layer, qkv, 50, 400)
    assert layer.waiting == (350 if policy == "evict" else 400)
    assert len(layer.segments) == (1 if policy == "evict" else 0)


@pytest.mark.parametrize("policy", ["evict", "quantize", "keep"])
def test_a_later_chunk_is_dense_and_prunes_nothing(policy) -> None:
    qkv = tensors(1, 70)
    _, layer, state = prefill(
        ZipVL(tau=0.7, min_tokens=0, policy=policy, high_bits=16, low_bits=8), tuple(x[:, :, :40] for x in qkv)
    )
    query, keys, values = (x[:, :, 40:] for x in qkv)
    mask = causal_rows(30, 70, query.device)[:, None]
    output, _ = tersor_attention(MODULE, query, *layer.update(keys, values), mask, scaling=SCALE)
    old = kept_rows(state)[0] if policy == "evict" else list(range(40))
    expected = naive(qkv, [*old, *range(40, 70)], list(range(40, 70)), torch.ones(70, 70).tril().bool())[40:]
    tolerance = 2e-2 if policy == "quantize" else 1e-5
    torch.testing.assert_close(output[0].double(), expected, atol=tolerance, rtol=tolerance)
    assert len(kept_rows(state)[0]) < 40
    assert layer.waiting == (70 if policy == "keep" else 30)


def test_short_prompts_are_read_densely_and_stay_whole() -> None:
    qkv = tensors(1, 50)
    output, layer, state = prefill(ZipVL(tau=0.5, min_tokens=51), qkv)
    assert torch.equal(output, dense(qkv))
    assert state.records[0].skipped == "short"
    assert layer.waiting == 50
    assert prefill(ZipVL(tau=0.5, min_tokens=50), qkv)[2].records[0].skipped is None


# -- property 12: quantize -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.6, 0.9, 0.975])
def test_quantized_bytes_follow_the_ratio(tau: float) -> None:
    qkv = tensors(1, 2048, sharpness=3.0)
    _, layer, state = prefill(ZipVL(tau=tau, policy="quantize"), qkv)
    important = len(kept_rows(state)[0])
    shape = {"batch": 1, "kv_heads": KV_HEADS, "key_dim": DIM, "value_dim": DIM}
    stored = tersor.bench.measure.storage_bytes(layer.owned())
    assert stored == pytest.approx(segment_bytes([(important, 4), (2048 - important, 2)], **shape), rel=0.02)
    # The spec's form: codes, and each token's minimum and step of its value and its position.
    ratio, numbers = important / 2048, 2 * KV_HEADS * DIM
    formula = (2 + 2 * ratio) / 16 + (2 * 2 + 4) / (2 * numbers)
    assert stored / (2 * numbers * 2048) == pytest.approx(formula, rel=0.05)


def test_important_tokens_are_stored_more_exactly() -> None:
    qkv = tensors(1, 300)
    _, layer, state = prefill(ZipVL(tau=0.8, policy="quantize", min_tokens=0), qkv)
    keys, values, present = layer.dequantize()
    assert present.all()
    important = torch.zeros(300, dtype=torch.bool)
    important[kept_rows(state)[0]] = True
    for exact, restored in zip(qkv[1:], (keys, values), strict=True):
        error = (exact - restored).abs().mean((0, 1, 3))
        assert error[important].mean() < error[~important].mean() / 2
    for group in layer.segments[0].groups:
        own = qkv[1].gather(2, group.positions.long()[..., None].expand(-1, KV_HEADS, -1, DIM))
        # Half a step, and what storing minimum and step in 16 bits moves.
        assert ((own - group.keys.decode()).abs() <= group.keys.step.float() * 0.5 + 0.01).all()


def test_new_tokens_are_compressed_every_hundred_by_the_mass_of_their_window() -> None:
    qkv = tensors(1, 460)
    _, layer, _ = prefill(ZipVL(tau=0.8, policy="quantize", min_tokens=0), tuple(x[:, :, :150] for x in qkv))
    first = layer.segments[0]
    for count in range(1, 311):
        decode(layer, qkv, 149 + count, 150 + count)
        assert len(layer.segments) == 1 + count // 100
        assert layer.waiting == count % 100
    assert layer.segments[0] is first
    assert [(each.start, each.length) for each in layer.segments] == [(0, 150), (150, 100), (250, 100), (350, 100)]
    # The last token's row, cut to the window and renormalized, holds tau on the tokens in four bits.
    query, keys = qkv[0][:, :, 249:250], qkv[1][:, :, 150:250]
    row = attention_rows(Queries(query, SCALE), keys, torch.ones(1, 1, 100, dtype=torch.bool)).mean(1)[0, 0]
    high = (layer.segments[1].groups[0].positions[0, 0] - 150).tolist()
    # Weights by head are relative to the whole row, so the window's mean over heads differs from `row`; both hold tau.
    assert 0.5 < float(row[high].sum()) <= 1.0
    assert 0 < len(high) < 100
    assert 99 in high


def test_keep_leaves_every_token_as_it_was() -> None:
    qkv = tensors(2, 60)
    output, layer, state = prefill(ZipVL(tau=0.6, policy="keep", min_tokens=0), qkv)
    assert torch.equal(layer.keys, qkv[1])
    assert torch.equal(layer.values, qkv[2])
    assert torch.equal(output, prefill(ZipVL(tau=0.6, min_tokens=0), qkv)[0])
    assert len(kept_rows(state)[0]) < 60


# -- property 14: FLOPs --------------------------------------------------------------------------------------------


def test_the_library_is_given_p_by_p_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, shapes, library = tensors(1, 80), [], AttentionCall.dense

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


# -- bad inputs ----------------------------------------------------------------------------------------------------


def test_scores_that_are_not_finite_leave_the_layer_dense() -> None:
    query, keys, values = tensors(1, 40)
    keys[0, 0, 5, 3] = math.nan
    with pytest.warns(UserWarning, match="layer 0: attention scores hold NaN"):
        output, layer, state = prefill(ZipVL(tau=0.5, min_tokens=0), (query, keys, values))
    torch.testing.assert_close(output, dense((query, keys, values)), equal_nan=True)
    assert state.records[0].skipped == "scores not finite"
    assert layer.segments[0].groups[0].positions.shape[-1] == 40
    with pytest.raises(ValueError, match="layer 0: attention scores"):
        prefill(ZipVL(tau=0.5, min_tokens=0, check_finite=True), (query, keys, values))


def test_half_precision_scores_do_not_overflow() -> None:
    query, keys, values = tensors(1, 64)
    own = (200 * query).half(), (200 * keys).half(), values.half()
    output, _, state = prefill(ZipVL(tau=0.9, min_tokens=0), own)
    assert torch.isfinite(output).all()
    assert state.records[0].skipped is None


@pytest.mark.parametrize("n", [1, 2, 100])
def test_fewer_tokens_than_probes_use_every_row(n: int) -> None:
    selection = MassSelection()
    assert selection.probe_rows(n, layer=0, segment=0).tolist() == list(range(n))
    assert torch.isfinite(prefill(ZipVL(min_tokens=0), tensors(1, n))[0]).all()


def test_probes_are_a_function_of_seed_layer_and_length() -> None:
    def rows(layer: int = 0, length: int = 1000, seed: int = 0) -> list[int]:
        torch.manual_seed(len(drawn))
        return MassSelection(seed=seed).probe_rows(length, layer=layer, segment=0).tolist()

    drawn: list[list[int]] = []
    for arguments in ({}, {}, {"layer": 1}, {"seed": 1}):
        drawn.append(rows(**arguments))
    assert drawn[0] == drawn[1]
    assert len({tuple(each) for each in drawn}) == 3
    assert drawn[0][64:] == list(range(936, 1000))
    assert len(set(drawn[0])) == 128


def test_dropout_acts_among_the_kept_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, seen = tensors(1, 60), []
    library = AttentionCall.dense

    def noting(call: AttentionCall):
        seen.append(call.dropout)
        return library(call)

    monkeypatch.setattr(AttentionCall, "dense", noting)
    ZipVL(tau=0.7, min_tokens=0).method().prefill.attend(asked(qkv, dropout=0.25))
    assert seen == [0.25]


# -- settings ------------------------------------------------------------------------------------------------------

BAD = {
    "tau": 0.0, "policy": "drop", "probe": "none", "probe_recent": 0, "probe_random": -1, "select_by": "age",
    "protect": "image", "protect_recent": 0, "protect_first": -1, "query_mode": "skip", "skip_layers": (-1,),
    "min_tokens": -1, "high_bits": 5, "low_bits": 0, "recompress_every": 0, "param_dtype": "int8",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_values_out_of_range_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ZipVL(**{name: BAD[name]})
    with pytest.raises(ValueError, match="at least low_bits=4"):
        ZipVL(high_bits=2, low_bits=4)


@pytest.mark.parametrize("tau", [1.5, -0.1, math.nan, True])
def test_tau_is_a_share(tau) -> None:
    with pytest.raises(ValueError, match=r"tau=.* must be a share above 0 and at most 1"):
        ZipVL(tau=tau)


def test_defaults_are_the_papers() -> None:
    recipe = ZipVL()
    assert (recipe.tau, recipe.policy, recipe.probe_recent, recipe.probe_random) == (0.975, "evict", 64, 64)
    assert (recipe.high_bits, recipe.low_bits, recipe.recompress_every, recipe.min_tokens) == (4, 2, 100, 256)
    assert (recipe.query_mode, recipe.skip_layers, recipe.protect_recent, recipe.protect_first) == ("drop", (), 1, 0)
    assert ZipVL.from_json(ZipVL(tau=0.9, skip_layers=(0,)).to_json()) == ZipVL(tau=0.9, skip_layers=(0,))


def test_policies_pick_the_engines_parts() -> None:
    for policy in ("evict", "quantize", "keep"):
        method = ZipVL(policy=policy).method()
        assert isinstance(method.prefill, SparsePrefill)
        assert method.prefill.sparse
        assert (method.selection == method.prefill.selection) == (policy != "keep")
    assert method.selection == RecentSelection(ratio=1.0)
    assert not tersor.ZipCache().method().prefill.sparse

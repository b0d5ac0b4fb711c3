"""MiniCache on one pair of layers, driven the way a model drives it (see test_layer.py for a single one)."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from tersor.bench.measure import storage_bytes
from tersor.kv.depth import merged_segment, merging
from tersor.kv.depth.guard import SimilarityGuard
from tersor.kv.depth.merging import merge_pair, restore
from tersor.kv.depth.pairs import PairedLayer
from tersor.kv.engine.attention import tersor_attention
from tersor.kv.engine.call import causal_rows
from tersor.kv.engine.tree import map_tensors
from tersor.kv.minicache import MiniCache

HEADS, KV_HEADS, DIM = 4, 2, 16
SMALL = {"streaming_gap": 10, "min_tokens_to_compress": 8, "max_relative_error": 2.0}
RAW = {**SMALL, "bits": 16, "param_dtype": "float32"}
Stream = list[tuple[Tensor, Tensor, Tensor]]


class Attention(nn.Module):
    """What a model's attention module shows to the attention function."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="tersor")
        self.num_key_value_groups = HEADS // KV_HEADS
        self.is_causal = True
        self.eval()


MODULE = Attention()


def stream(batch: int, tokens: int, *, spread: float = 0.3, seed: int = 0) -> Stream:
    """Queries, keys and values ``[batch, heads, tokens, dim]`` of two similar layers of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        return torch.randn(batch, heads, tokens, DIM, generator=generator)

    keys, values = draw(KV_HEADS), draw(KV_HEADS)
    return [
        (draw(HEADS), size * (keys + spread * draw(KV_HEADS)), size * (values + spread * draw(KV_HEADS)))
        for size in (1.0, 2.5)
    ]


def on(function, tensors: Stream) -> Stream:
    return [tuple(function(x) for x in layer) for layer in tensors]


def new_pair(recipe: MiniCache) -> tuple[PairedLayer, PairedLayer]:
    depth = recipe.method().depth
    return PairedLayer.pair(
        recipe.method(), depth.rule, 0, SimilarityGuard([(0, 1)], depth.max_relative_error, depth.strict)
    )


def step(layers, tensors: Stream, mask: Tensor | None = None) -> list[Tensor]:
    """One forward through both layers; returns ``[batch, new, heads, dim]`` of each."""
    outputs = []
    for layer, (query, keys, values) in zip(layers, tensors, strict=True):
        new, here = query.shape[2], mask
        if here is None and new > 1 and layer.get_seq_length():
            here = causal_rows(new, layer.get_seq_length() + new, query.device)[:, None]
            here = here.expand(query.shape[0], 1, -1, -1)
        k, v = layer.update(keys, values)
        outputs.append(tersor_attention(MODULE, query, k, v, here)[0])
    return outputs


def feed(layers, tensors: Stream, start: int, stop: int) -> list[Tensor]:
    return [out for i in range(start, stop) for out in step(layers, on(lambda x, i=i: x[:, :, i : i + 1], tensors))]


def filled(recipe: MiniCache, tensors: Stream, prompt: int, stop: int) -> tuple[PairedLayer, PairedLayer]:
    layers = new_pair(recipe)
    step(layers, on(lambda x: x[:, :, :prompt], tensors))
    feed(layers, tensors, prompt, stop)
    return layers


def padding_mask(batch: int, tokens: int, pads: list[int]) -> Tensor:
    mask = causal_rows(tokens, tokens, torch.device("cpu"))[:, None].repeat(batch, 1, 1, 1)
    for sample, pad in enumerate(pads):
        mask[sample, ..., :pad] = False
    return mask


# -- invariants 2, 5, 7, 13: what is stored ------------------------------------------------------------------------


def check_lengths(recipe: MiniCache, tolerance: float) -> None:
    tensors = stream(2, 60)
    for layer, exact in zip(filled(recipe, tensors, 60, 60), tensors, strict=True):
        for restored, x in zip(layer.dequantize(), exact[1:], strict=False):
            if recipe.granularity == "token":
                restored, x = (y.transpose(1, 2).flatten(2) for y in (restored, x))
            torch.testing.assert_close(restored.norm(dim=-1), x.norm(dim=-1), rtol=tolerance, atol=0)


@pytest.mark.parametrize("granularity", ["head", "token"])
@pytest.mark.parametrize("bits", [2, 4, 16])
def test_lengths_survive_storage(bits: int, granularity: str) -> None:
    common = {**SMALL, "bits": bits, "granularity": granularity, "gamma": 0.0}
    check_lengths(MiniCache(**common), 1e-3)
    check_lengths(MiniCache(**common, param_dtype="float32"), 2e-6)


def test_the_length_check_catches_lengths_of_the_unrounded_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_the_norm(x: Tensor, granularity: str) -> SimpleNamespace:
        return SimpleNamespace(norm=lambda dim: torch.ones(x.shape[:-1]))

    monkeypatch.setattr(merged_segment, "as_units", forget_the_norm)
    with pytest.raises(AssertionError):
        check_lengths(MiniCache(**SMALL, gamma=0.0, bits=2), 1e-3)


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_measured_error_is_the_predicted_one(granularity: str) -> None:
    recipe = MiniCache(**RAW, granularity=granularity)
    tensors = stream(1, 200)
    layers = filled(recipe, tensors, 200, 200)
    errors = []
    for layer, exact in zip(layers, tensors, strict=True):
        apart = layers[0].merged[0].apart[0].groups[0].positions[0, 0].long()
        together = [i for i in range(200) if i not in apart.tolist()]
        for restored, x in zip(layer.dequantize(), exact[1:], strict=False):
            assert torch.equal(restored[:, :, apart], x[:, :, apart])
            if granularity == "token":
                restored, x = (y.transpose(1, 2).flatten(2)[:, None] for y in (restored, x))
            errors.append(((restored - x).norm(dim=-1) / x.norm(dim=-1))[:, :, together].mean())
    assert float(sum(errors) / 4) == pytest.approx(layers[0].summary()["predicted_error"], rel=1e-4)


def test_rounding_adds_at_most_its_own_error() -> None:
    tensors = stream(1, 100)
    exact, rounded = (filled(MiniCache(**{**RAW, "bits": bits}), tensors, 100, 100) for bits in (16, 4))
    directions = merge_pair(tensors[0][1], tensors[1][1], 0.6).directions
    step_size = (directions.amax(2) - directions.amin(2)) / 15
    merged = exact[0].merged[0].groups[0].directions.positions[0, 0].long()
    for one, other, x in zip(exact, rounded, tensors, strict=True):
        error = (one.dequantize()[0] - other.dequantize()[0])[:, :, merged].norm(dim=-1)
        # Twice half a step in every channel: once for rounding, once for the length that makes up for it.
        bound = x[1].norm(dim=-1)[:, :, merged] * step_size.norm(dim=-1)[:, :, None]
        assert (error <= bound).all()


def test_planted_outliers_are_kept_bit_exact_in_both_layers() -> None:
    tensors = stream(2, 100, spread=0.2)
    for sample, token in ((0, 0), (0, 31), (1, 77)):
        tensors[1][1][sample, :, token] *= -1
    layers = filled(MiniCache(**RAW), tensors, 100, 100)
    for layer, exact in zip(layers, tensors, strict=True):
        for restored, x in zip(layer.dequantize(), exact[1:], strict=False):
            for sample, token in ((0, 0), (0, 31), (1, 77)):
                assert torch.equal(restored[sample, :, token], x[sample, :, token])
    assert [group.valid.sum(-1).flatten().tolist() for group in layers[0].merged[0].apart[0].groups] == [[2, 1]]


# -- invariant 14 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["head", "token"])
@pytest.mark.parametrize("bits", [2, 16])
def test_fused_attention_equals_restoring_first(bits: int, granularity: str) -> None:
    tensors = stream(2, 61)
    layers = filled(MiniCache(**{**RAW, "bits": bits}, granularity=granularity), tensors, 40, 60)
    dense = [layer.dequantize()[:2] for layer in layers]
    outputs = step(layers, on(lambda x: x[:, :, 60:], tensors))
    for output, restored, (query, keys, values) in zip(outputs, dense, tensors, strict=True):
        k, v = (
            torch.cat([old, new[:, :, 60:]], 2).repeat_interleave(2, 1)
            for old, new in zip(restored, (keys, values), strict=True)
        )
        expected = nn.functional.scaled_dot_product_attention(query[:, :, 60:], k, v).transpose(1, 2)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


# -- invariant 9 ---------------------------------------------------------------------------------------------------


def rows_of(segment, sample: int) -> list[Tensor]:
    """Everything stored for one sample of a merged segment, empty slots left out."""
    rows = []
    for group in segment.groups:
        own = group.directions
        slots = slice(None) if own.valid is None else own.valid[sample, 0]
        rows += [own.keys.codes[sample][:, slots], own.values.codes[sample][:, slots], own.keys.step[sample]]
        rows += [m[sample][:, slots] for m in (*group.key_lengths, *group.value_lengths)]
    for part in segment.apart:
        for group in part.groups:
            slots = slice(None) if group.valid is None else group.valid[sample, 0]
            rows += [group.keys.codes[sample][:, slots], group.values.codes[sample][:, slots]]
    return rows


def check_padding_invariance(recipe) -> None:
    pads = [0, 17, 40]
    tensors = stream(3, 75)
    together = new_pair(recipe)
    step(together, on(lambda x: x[:, :, :60], tensors), padding_mask(3, 60, pads))
    for i in range(60, 75):
        step(together, on(lambda x, i=i: x[:, :, i : i + 1], tensors), padding_mask(3, i + 1, pads)[:, :, -1:])
    for sample, pad in enumerate(pads):
        own = on(lambda x, s=sample, p=pad: x[s : s + 1, :, p:], tensors)
        alone = filled(recipe, own, 60 - pad, 75 - pad)
        assert len(alone[0].merged) == len(together[0].merged) == 2
        for mine, theirs in zip(alone[0].merged, together[0].merged, strict=True):
            for got, expected in zip(rows_of(theirs, sample), rows_of(mine, 0), strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("settings", [{}, {"granularity": "token"}, {"retention": "quantile", "gamma": 0.1}])
def test_left_padding_changes_no_bit(settings: dict) -> None:
    check_padding_invariance(MiniCache(**SMALL, **settings))


def test_the_padding_check_catches_a_threshold_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    right = merging.retained

    def of_the_batch(distance: Tensor, **kw) -> Tensor:
        flat = {name: x.reshape(1, -1) if isinstance(x, Tensor) else x for name, x in kw.items()}
        return right(distance.reshape(1, -1), **flat).reshape(distance.shape)

    monkeypatch.setattr(merging, "retained", of_the_batch)
    with pytest.raises(AssertionError):
        check_padding_invariance(MiniCache(**SMALL))


def test_a_fully_padded_row_stays_finite() -> None:
    tensors = stream(2, 50)
    layers = new_pair(MiniCache(**SMALL))
    step(layers, on(lambda x: x[:, :, :40], tensors), padding_mask(2, 40, [0, 40]))
    for i in range(40, 50):
        mask = padding_mask(2, i + 1, [0, 40])[:, :, -1:]
        outputs = step(layers, on(lambda x, i=i: x[:, :, i : i + 1], tensors), mask)
    assert all(torch.isfinite(x).all() for x in (*outputs, *layers[1].dequantize()))


# -- invariant 10 --------------------------------------------------------------------------------------------------


def test_the_gap_changes_nothing_but_thresholds_and_parameters() -> None:
    """Raw and with nothing retained, merging token by token stores what merging ten together does."""
    tensors = stream(1, 60)
    stores = [filled(MiniCache(**{**RAW, "streaming_gap": gap}, gamma=0.0), tensors, 40, 60) for gap in (1, 10)]
    for one, other in zip(*stores, strict=True):
        assert one.waiting == other.waiting == 0
        for got, expected in zip(one.dequantize(), other.dequantize(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


# -- invariant 11: operations, and sharing -------------------------------------------------------------------------

ORDER = torch.tensor([2, 0, 0])
OPERATIONS = {
    "reorder": (lambda layer: layer.reorder_cache(ORDER), lambda x: x[ORDER]),
    "repeat": (lambda layer: layer.batch_repeat_interleave(2), lambda x: x.repeat_interleave(2, 0)),
    "select": (lambda layer: layer.batch_select_indices(torch.tensor([1, 2])), lambda x: x[[1, 2]]),
}


def check_operation(operation, on_inputs) -> None:
    """The operation, then appending, equals the operation on the inputs first; and nothing is held twice."""
    pads = [0, 9, 20]
    tensors = stream(3, 60)
    masks = [padding_mask(3, 40, pads)] + [padding_mask(3, i + 1, pads)[:, :, -1:] for i in range(40, 60)]

    def run(layers, tensors: Stream, masks, begin: int, stop: int) -> list[Tensor]:
        if begin == 0:
            outputs = step(layers, on(lambda x: x[:, :, :40], tensors), masks[0])
        for i in range(max(begin, 40), stop):
            outputs = step(layers, on(lambda x, i=i: x[:, :, i : i + 1], tensors), masks[i - 39])
        return outputs

    after, before = new_pair(MiniCache(**SMALL)), new_pair(MiniCache(**SMALL))
    run(after, tensors, masks, 0, 47)
    for layer in after:
        operation(layer)
    assert after[0].segments[0].merged is after[1].segments[0].merged
    tensors, masks = on(on_inputs, tensors), [on_inputs(mask) for mask in masks]
    outputs = run(after, tensors, masks, 47, 60)
    expected = run(before, tensors, masks, 0, 60)
    for one, other, got, wanted in zip(after, before, outputs, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        for x, y in zip(one.dequantize(), other.dequantize(), strict=True):
            torch.testing.assert_close(x, y)
    # The operated segments may carry empty slots that a fresh run does not, but far less than a second copy.
    held, fresh = (storage_bytes([layer.owned() for layer in layers]) for layers in (after, before))
    assert held <= 1.3 * fresh


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_commute_with_appending_and_keep_sharing(name: str) -> None:
    check_operation(*OPERATIONS[name])


def test_the_operation_check_catches_lost_sharing() -> None:
    def each_for_itself(layer: PairedLayer) -> None:
        layer.map_buffer(lambda x: x[ORDER])
        layer.segments = map_tensors(layer.segments, lambda x: x[ORDER])

    with pytest.raises(AssertionError):
        check_operation(each_for_itself, lambda x: x[ORDER])


def test_crop_in_the_buffer_leaves_no_trace() -> None:
    tensors, wrong = stream(2, 70), stream(2, 70, seed=9)
    plain, cropped = (filled(MiniCache(**SMALL), tensors, 40, 44) for _ in range(2))
    feed(cropped, wrong, 44, 48)
    for layer in cropped:
        layer.crop(-4)
    for layers in (plain, cropped):
        feed(layers, tensors, 44, 65)
    assert len(plain[0].merged) == 3
    for one, other in zip(cropped, plain, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one.dequantize(), other.dequantize(), strict=True))


def test_crop_into_merged_tokens_keeps_the_rest_readable() -> None:
    tensors = stream(2, 60)
    layers = filled(MiniCache(**SMALL), tensors, 40, 57)
    whole = [layer.dequantize() for layer in layers]
    for layer in layers:
        layer.crop(-22)
    for layer, before in zip(layers, whole, strict=True):
        assert layer.get_seq_length() == 35
        assert all(torch.equal(x, y[:, :, :35]) for x, y in zip(layer.dequantize(), before, strict=True))
    assert layers[0].segments[0].merged is layers[1].segments[0].merged
    feed(layers, tensors, 35, 50)
    for layer in layers:
        layer.crop(-50)
        assert layer.get_seq_length() == 0
    assert not layers[0].merged
    assert not layers[1].segments


def test_recording_postpones_merging_until_crop() -> None:
    layers = new_pair(MiniCache(**SMALL))
    for layer in layers:
        layer.activate_past_recording()
    step(layers, on(lambda x: x[:, :, :40], stream(1, 40)))
    assert not layers[0].merged
    for layer in layers:
        layer.crop(-3)
    assert [segment.length for segment in layers[0].merged] == [37]
    assert [layer.waiting for layer in layers] == [0, 0]


def test_lengths_are_right_between_the_two_updates() -> None:
    tensors = stream(1, 60)
    layers = filled(MiniCache(**SMALL), tensors, 40, 49)
    query, keys, values = (x[:, :, 49:50] for x in tensors[0])
    k, v = layers[0].update(keys, values)
    assert [layer.get_seq_length() for layer in layers] == [50, 49]
    tersor_attention(MODULE, query, k, v, None)
    assert [layer.waiting for layer in layers] == [10, 9]
    query, keys, values = (x[:, :, 49:50] for x in tensors[1])
    tersor_attention(MODULE, query, *layers[1].update(keys, values), None)
    assert [layer.get_seq_length() for layer in layers] == [50, 50]
    assert [layer.waiting for layer in layers] == [0, 0]


def test_a_skipped_second_layer_loses_nothing() -> None:
    tensors = stream(1, 70)
    layers = filled(MiniCache(**RAW), tensors, 40, 45)
    for i in range(45, 65):  # drafts of the first layer alone
        step(layers[:1], on(lambda x, i=i: x[:, :, i : i + 1], tensors[:1]))
    assert [layer.get_seq_length() for layer in layers] == [65, 45]
    assert len(layers[0].merged) == 1
    assert torch.equal(layers[0].keys, tensors[0][1][:, :, 40:65])
    layers[0].crop(-20)
    feed(layers, tensors, 45, 50)
    assert [segment.length for segment in layers[0].merged] == [40, 10]


def test_reset_copies_and_offload() -> None:
    tensors = stream(1, 70)
    layers = filled(MiniCache(**SMALL), tensors, 40, 47)
    copies = [copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))]
    shared = layers[0].merged[0]
    layers[0].offload()  # the second layer reads next what is shared
    assert layers[1].segments[0].merged is shared
    layers[1].offload()
    assert layers[0].segments[0].merged is layers[1].segments[0].merged is not shared
    for layer in layers:
        layer.prefetch()
    expected = feed(layers, tensors, 47, 70)
    for clones in copies:
        assert clones[0].mate is clones[1]
        assert clones[0].segments[0].merged is clones[1].segments[0].merged
        for got, wanted in zip(feed(clones, tensors, 47, 70), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for layer in layers:
        layer.reset()
    assert storage_bytes([layer.owned() for layer in layers]) == 0
    step(layers, on(lambda x: x[:, :, :40], stream(3, 40)))
    assert len(layers[1].segments) == 1


def test_layers_on_different_devices_or_of_different_shapes_part() -> None:
    tensors = stream(1, 50)
    layers = new_pair(MiniCache(**RAW))
    tensors[1] = tuple(x[..., :8] for x in tensors[1])
    with pytest.warns(UserWarning, match=r"layers 0 and 1 are not merged: their .*16.* and .*8"):
        step(layers, on(lambda x: x[:, :, :40], tensors))
    for layer, exact in zip(layers, tensors, strict=True):
        assert layer.mate is None
        assert torch.equal(layer.dequantize()[0], exact[1][:, :, :40])
    feed(layers, tensors, 40, 50)
    assert [len(layer.segments) for layer in layers] == [2, 2]
    far = new_pair(MiniCache(**RAW))
    step(far[:1], on(lambda x: x[:, :, :40], stream(1, 40)[:1]))
    far[0].device = torch.device("cuda:1")
    with pytest.warns(UserWarning, match="they are on cuda:1 and cpu"):
        step(far[1:], on(lambda x: x[:, :, :40], stream(1, 40)[1:]))


def test_without_the_attention_function_it_stays_right() -> None:
    tensors = stream(1, 60)
    layers = new_pair(MiniCache(**RAW, gamma=0.0))
    for layer, (_, keys, values) in zip(layers, tensors, strict=True):
        layer.update(keys[:, :, :40], values[:, :, :40])
    with pytest.warns(UserWarning, match="does not use the attention function"):
        for i in range(40, 60):
            for layer, (_, keys, values) in zip(layers, tensors, strict=True):
                k, v = layer.update(keys[:, :, i : i + 1], values[:, :, i : i + 1])
                assert k.shape[2] == v.shape[2] == layer.get_seq_length() == i + 1
    assert [segment.length for segment in layers[0].merged] == [40, 10]
    pair = merge_pair(tensors[0][1], tensors[1][1], 0.6)
    torch.testing.assert_close(k[:, :, :50], restore(pair.directions, pair.lengths[1])[:, :, :50])


ACTS = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 14)),
    st.tuples(st.just("crop"), st.integers(-25, 0)),
    st.tuples(st.just("reorder_cache"), st.sampled_from([[1, 0], [1, 1]])),
    st.tuples(st.just("reset"), st.none()),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(ACTS, min_size=4, max_size=14))
def test_any_sequence_of_operations_equals_dynamic_layers(acts: list) -> None:
    """With everything retained, raw, nothing is ever lost, doubled or out of order."""
    layers, dynamic = new_pair(MiniCache(**{**RAW, "gamma": 1.0})), (DynamicLayer(), DynamicLayer())
    for seed, (name, argument) in enumerate(acts):
        if name == "step":
            tensors = stream(2, argument, seed=seed)
            step(layers, tensors)
            for layer, (_, keys, values) in zip(dynamic, tensors, strict=True):
                layer.update(keys, values)
        elif dynamic[0].is_initialized:
            given = [] if argument is None else [torch.tensor(argument) if name == "reorder_cache" else argument]
            for layer in (*layers, *dynamic):
                getattr(layer, name)(*given)
        for layer, exact in zip(layers, dynamic, strict=True):
            assert layer.get_seq_length() == exact.get_seq_length()
            if layer.get_seq_length():
                keys, values, _ = layer.dequantize()
                assert torch.equal(keys, exact.keys)
                assert torch.equal(values, exact.values)


# -- invariant 12: bytes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"gamma": 0.0}, {"gamma": 0.05, "retention": "quantile"}], ids=["none", "5 %"])
@pytest.mark.parametrize("granularity", ["head", "token"])
def test_bytes_are_the_formula(settings: dict, granularity: str) -> None:
    """One pair of the width h = 4096 at 16 bits; positions are not in the paper's formula."""
    tokens, heads, dim = 200, 32, 128
    layers = new_pair(MiniCache(**SMALL, bits=16, granularity=granularity, **settings))
    keys = torch.randn(1, heads, tokens, dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    for layer in layers:
        k, v = layer.update(keys.roll(layer.layer_idx, 2), keys.roll(1 + layer.layer_idx, 2))
        tersor_attention(MODULE, keys[:, :1].expand(-1, 2 * heads, -1, -1), k, v, None)
    row = layers[0].summary()
    held = storage_bytes([layer.owned() for layer in layers])
    assert sum(row["bytes"].values()) == held
    kept = settings["gamma"] * tokens
    h, units = heads * dim, 1 if granularity == "token" else heads
    formula = 2 * 2 * (h * (tokens - kept) + 2 * h * kept + 2 * units * (tokens - kept))
    positions = 4 * (tokens - kept) + 2 * 4 * kept
    assert held == formula + positions
    # The paper's ratio for half the layers: 4h / (3.1h + 2), and 4h / (3h + 2) without retained tokens.
    full = 2 * 2 * 2 * h * tokens
    paper = 4 * h / ((3.1 if kept else 3) * h + 2)
    if granularity == "token":
        assert 2 * full / (full + held - positions) == pytest.approx(paper, rel=0.02)

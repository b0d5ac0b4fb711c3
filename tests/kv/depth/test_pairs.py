"""Two merged layers, driven the way a model drives them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_driver import (
    MODULE,
    PAIR_RAW,
    PAIR_SMALL,
    Stream,
    filled_pair,
    new_pair,
    on,
    padding_mask,
    pair_feed,
    pair_step,
    pair_stream,
)
from tiny_models import build, prompt
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tersor.bench.measure import storage_bytes
from tersor.kv.depth.merging import merge_pair, restore
from tersor.kv.depth.pairs import MergedPairs, PairedLayer
from tersor.kv.engine.attention import tersor_attention
from tersor.kv.engine.tree import map_tensors
from tersor.kv.method import KVMethod
from tersor.kv.minicache import MiniCache
from tersor.kv.selection.ratio import SaliencySelection
from tersor.kv.storage.mixed import MixedPrecisionStorage

ORDER = torch.tensor([2, 0, 0])


OPERATIONS = {
    "reorder": (lambda layer: layer.reorder_cache(ORDER), lambda x: x[ORDER]),
    "repeat": (lambda layer: layer.batch_repeat_interleave(2), lambda x: x.repeat_interleave(2, 0)),
    "select": (lambda layer: layer.batch_select_indices(torch.tensor([1, 2])), lambda x: x[[1, 2]]),
}


def check_operation(operation, on_inputs) -> None:
    """The operation, then appending, equals the operation on the inputs first; and nothing is held twice."""
    pads = [0, 9, 20]
    tensors = pair_stream(3, 60)
    masks = [padding_mask(3, 40, pads)] + [padding_mask(3, i + 1, pads)[:, :, -1:] for i in range(40, 60)]

    def run(layers, tensors: Stream, masks, begin: int, stop: int) -> list[Tensor]:
        if begin == 0:
            outputs = pair_step(layers, on(lambda x: x[:, :, :40], tensors), masks[0])
        for i in range(max(begin, 40), stop):
            outputs = pair_step(layers, on(lambda x, i=i: x[:, :, i : i + 1], tensors), masks[i - 39])
        return outputs

    after, before = new_pair(MiniCache(**PAIR_SMALL)), new_pair(MiniCache(**PAIR_SMALL))
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


def test_crop_into_merged_tokens_keeps_the_rest_readable() -> None:
    tensors = pair_stream(2, 60)
    layers = filled_pair(MiniCache(**PAIR_SMALL), tensors, 40, 57)
    whole = [layer.dequantize() for layer in layers]
    for layer in layers:
        layer.crop(-22)
    for layer, before in zip(layers, whole, strict=True):
        assert layer.get_seq_length() == 35
        assert all(torch.equal(x, y[:, :, :35]) for x, y in zip(layer.dequantize(), before, strict=True))
    assert layers[0].segments[0].merged is layers[1].segments[0].merged
    pair_feed(layers, tensors, 35, 50)
    for layer in layers:
        layer.crop(-50)
        assert layer.get_seq_length() == 0
    assert not layers[0].merged
    assert not layers[1].segments


def test_recording_postpones_merging_until_crop() -> None:
    layers = new_pair(MiniCache(**PAIR_SMALL))
    for layer in layers:
        layer.activate_past_recording()
    pair_step(layers, on(lambda x: x[:, :, :40], pair_stream(1, 40)))
    assert not layers[0].merged
    for layer in layers:
        layer.crop(-3)
    assert [segment.length for segment in layers[0].merged] == [37]
    assert [layer.waiting for layer in layers] == [0, 0]


def test_lengths_are_right_between_the_two_updates() -> None:
    tensors = pair_stream(1, 60)
    layers = filled_pair(MiniCache(**PAIR_SMALL), tensors, 40, 49)
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
    tensors = pair_stream(1, 70)
    layers = filled_pair(MiniCache(**PAIR_RAW), tensors, 40, 45)
    for i in range(45, 65):  # drafts of the first layer alone
        pair_step(layers[:1], on(lambda x, i=i: x[:, :, i : i + 1], tensors[:1]))
    assert [layer.get_seq_length() for layer in layers] == [65, 45]
    assert len(layers[0].merged) == 1
    assert torch.equal(layers[0].keys, tensors[0][1][:, :, 40:65])
    layers[0].crop(-20)
    pair_feed(layers, tensors, 45, 50)
    assert [segment.length for segment in layers[0].merged] == [40, 10]


def test_reset_copies_and_offload() -> None:
    tensors = pair_stream(1, 70)
    layers = filled_pair(MiniCache(**PAIR_SMALL), tensors, 40, 47)
    copies = [copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))]
    shared = layers[0].merged[0]
    layers[0].offload()  # the second layer reads next what is shared
    assert layers[1].segments[0].merged is shared
    layers[1].offload()
    assert layers[0].segments[0].merged is layers[1].segments[0].merged is not shared
    for layer in layers:
        layer.prefetch()
    expected = pair_feed(layers, tensors, 47, 70)
    for clones in copies:
        assert clones[0].mate is clones[1]
        assert clones[0].segments[0].merged is clones[1].segments[0].merged
        for got, wanted in zip(pair_feed(clones, tensors, 47, 70), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for layer in layers:
        layer.reset()
    assert storage_bytes([layer.owned() for layer in layers]) == 0
    pair_step(layers, on(lambda x: x[:, :, :40], pair_stream(3, 40)))
    assert len(layers[1].segments) == 1


def test_layers_on_different_devices_or_of_different_shapes_part() -> None:
    tensors = pair_stream(1, 50)
    layers = new_pair(MiniCache(**PAIR_RAW))
    tensors[1] = tuple(x[..., :8] for x in tensors[1])
    with pytest.warns(UserWarning, match=r"layers 0 and 1 are not merged: their .*16.* and .*8"):
        pair_step(layers, on(lambda x: x[:, :, :40], tensors))
    for layer, exact in zip(layers, tensors, strict=True):
        assert layer.mate is None
        assert torch.equal(layer.dequantize()[0], exact[1][:, :, :40])
    pair_feed(layers, tensors, 40, 50)
    assert [len(layer.segments) for layer in layers] == [2, 2]
    far = new_pair(MiniCache(**PAIR_RAW))
    pair_step(far[:1], on(lambda x: x[:, :, :40], pair_stream(1, 40)[:1]))
    far[0].device = torch.device("cuda:1")
    with pytest.warns(UserWarning, match="they are on cuda:1 and cpu"):
        pair_step(far[1:], on(lambda x: x[:, :, :40], pair_stream(1, 40)[1:]))


def test_without_the_attention_function_it_stays_right() -> None:
    tensors = pair_stream(1, 60)
    layers = new_pair(MiniCache(**PAIR_RAW, gamma=0.0))
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
    layers, dynamic = new_pair(MiniCache(**{**PAIR_RAW, "gamma": 1.0})), (DynamicLayer(), DynamicLayer())
    for seed, (name, argument) in enumerate(acts):
        if name == "step":
            tensors = pair_stream(2, argument, seed=seed)
            pair_step(layers, tensors)
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


def test_the_split_of_a_pair_is_decided_by_both_layers() -> None:
    """Each layer attends to tokens of its own; of four kept, the pair keeps the two favourites of either."""
    from tersor.kv.depth.pairs import pooled_scores
    from tersor.kv.selection.probes import ProbeScores

    one, other = (ProbeScores(torch.zeros(1, 1, 8), torch.ones(1, 8)) for _ in range(2))
    one.sums[0, 0, [0, 3]] = 1.0
    other.sums[0, 0, [5, 6]] = 0.5
    pooled = pooled_scores([one, other], 7)
    assert pooled.sums[0, 0].nonzero()[:, 0].tolist() == [0, 3, 5, 6]
    assert pooled.counts[0].tolist() == [2.0] * 7
    assert pooled_scores([one, ProbeScores()], 7).sums[0, 0, 3] == 1.0
    assert pooled_scores([ProbeScores(), ProbeScores()], 7).sums is None


def test_one_length_a_token_needs_one_choice_of_tokens() -> None:
    with pytest.raises(ValueError, match="use granularity='head'"):
        KVMethod(
            selection=SaliencySelection(ratio=0.5, scope="kv_head"),
            storage=MixedPrecisionStorage(value_param_scope="token_head"),
            depth=MergedPairs(granularity="token"),
        )


def test_a_cache_counts_shared_storage_once_and_saves_it_once() -> None:
    model = build("llama")
    recipe = MiniCache(**PAIR_SMALL, start_layer=0)
    with recipe.on(model) as session, torch.no_grad():
        model.generate(prompt(2, 60), max_new_tokens=14, do_sample=False)
    cache = session.cache
    assert cache is not None
    (row,) = cache.summary()["pairs"]
    assert cache.memory_footprint() == sum(row["bytes"].values())
    named = cache.state_dict()
    pointers = [x.data_ptr() for x in named.values() if x.numel()]
    assert len(set(pointers)) == len(pointers)
    assert row["layers"] == [0, 1]
    assert 0 < row["retained"] <= 0.1
    before = cache.memory_footprint()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.memory_footprint() == before
    clone = copy.deepcopy(cache)
    assert clone.memory_footprint() == before
    assert clone.layers[0].mate is clone.layers[1]

"""Invariants 7 and 9 to 13 on one layer, driven the way a model drives it."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from tersor.bench.measure import storage_bytes
from tersor.kv.engine.attention import tersor_attention
from tersor.kv.engine.call import causal_rows
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.storage.segments import TokenGroup
from tersor.kv.zipcache import ZipCache
from tersor.lowbit.bytes import segment_bytes

HEADS, KV_HEADS, DIM = 4, 2, 16


class Attention(nn.Module):
    """What a model's attention module shows to the attention function."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="tersor")
        self.num_key_value_groups = HEADS // KV_HEADS
        self.is_causal = True
        self.eval()


MODULE = Attention()


def stream(batch: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values ``[batch, heads, tokens, dim]``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, HEADS, tokens, DIM), (batch, KV_HEADS, tokens, DIM), (batch, KV_HEADS, tokens, DIM)]
    query, keys, values = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, keys, values


def step(layer: CompressedLayer, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """One forward of one layer: update, then attention. Returns ``[batch, new, heads, dim]``."""
    new = query.shape[2]
    if mask is None and new > 1 and layer.get_seq_length():
        mask = causal_rows(new, layer.get_seq_length() + new, query.device)[:, None].expand(query.shape[0], 1, -1, -1)
    k, v = layer.update(keys, values)
    return tersor_attention(MODULE, query, k, v, mask)[0]


def feed(layer: CompressedLayer, tensors: tuple[Tensor, Tensor, Tensor], start: int, stop: int) -> list[Tensor]:
    """Decode tokens ``start:stop`` one at a time."""
    return [step(layer, *(x[:, :, i : i + 1] for x in tensors)) for i in range(start, stop)]


def filled(recipe: ZipCache, tensors: tuple[Tensor, Tensor, Tensor], prompt: int, stop: int) -> CompressedLayer:
    layer = CompressedLayer(recipe.method(), 0)
    step(layer, *(x[:, :, :prompt] for x in tensors))
    feed(layer, tensors, prompt, stop)
    return layer


def padding_mask(batch: int, tokens: int, pads: list[int]) -> Tensor:
    """Causal mask ``[batch, 1, tokens, tokens]`` with ``pads`` left-padded columns closed."""
    mask = causal_rows(tokens, tokens, torch.device("cpu"))[:, None].repeat(batch, 1, 1, 1)
    for sample, pad in enumerate(pads):
        mask[sample, ..., :pad] = False
    return mask


SMALL = {"streaming_gap": 10, "min_tokens_to_compress": 8}

# -- invariant 7 ---------------------------------------------------------------------------------------------------


def output_error(recipe: ZipCache) -> float:
    """Mean absolute error of the next output, whose own size is about 0.3."""
    tensors = stream(2, 71)
    layer = filled(recipe, tensors, 60, 70)
    last = tuple(x[:, :, 70:] for x in tensors)
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in tensors[1:])
    exact = nn.functional.scaled_dot_product_attention(last[0], keys, values).transpose(1, 2)
    return float((step(layer, *last) - exact).abs().mean())


def check_error_falls(errors: list[float]) -> None:
    assert all(better < worse for better, worse in zip(errors[1:], errors, strict=False)), errors


def test_error_falls_with_bits_and_ratio() -> None:
    check_error_falls([output_error(ZipCache(saliency_ratio=1.0, high_bits=b, **SMALL)) for b in (2, 4, 8)])
    check_error_falls([output_error(ZipCache(saliency_ratio=r, **SMALL)) for r in (0.0, 0.4, 0.8, 1.0)])
    assert output_error(ZipCache(saliency_ratio=1.0, high_bits=8, **SMALL)) < 2e-3


def test_the_error_check_catches_swapped_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.kv.storage.mixed import MixedPrecisionStorage

    encode = MixedPrecisionStorage.encode
    monkeypatch.setattr(
        MixedPrecisionStorage,
        "encode",
        lambda self, k, v, chosen, **kw: encode(self, k, v, chosen[::-1], **kw),
    )
    with pytest.raises(AssertionError):
        check_error_falls([output_error(ZipCache(saliency_ratio=r, **SMALL)) for r in (0.0, 0.4, 0.8, 1.0)])


# -- invariant 9 ---------------------------------------------------------------------------------------------------


def group_rows(group: TokenGroup, sample: int) -> list[Tensor]:
    """Everything stored for one sample of a group, empty slots left out."""
    slots = slice(None) if group.valid is None else group.valid[sample, 0]
    rows = [group.keys.codes[sample][:, slots], group.keys.minimum[sample], group.keys.step[sample]]
    for stored in (group.values.codes, group.values.minimum, group.values.step):
        rows.append(stored[sample][:, slots])
    return rows


def check_padding_invariance(recipe: ZipCache) -> None:
    pads = [0, 17, 40]
    tensors = stream(3, 75)
    together = CompressedLayer(recipe.method(), 0)
    step(together, *(x[:, :, :60] for x in tensors), mask=padding_mask(3, 60, pads))
    for i in range(60, 75):
        mask = padding_mask(3, i + 1, pads)[:, :, -1:]
        step(together, *(x[:, :, i : i + 1] for x in tensors), mask=mask)
    for sample, pad in enumerate(pads):
        alone = filled(recipe, tuple(x[sample : sample + 1, :, pad:] for x in tensors), 60 - pad, 75 - pad)
        assert len(alone.segments) == len(together.segments) == 2
        for mine, theirs in zip(alone.segments, together.segments, strict=True):
            assert torch.equal(mine.channel_scale[0], theirs.channel_scale[sample])
            for single, padded in zip(mine.groups, theirs.groups, strict=True):
                for got, expected in zip(group_rows(padded, sample), group_rows(single, 0), strict=True):
                    assert torch.equal(got, expected)
                slots = slice(None) if padded.valid is None else padded.valid[sample, 0]
                assert torch.equal(padded.positions[sample][:, slots] - pad, single.positions[0])


@pytest.mark.parametrize(
    "recipe",
    [
        ZipCache(**SMALL),
        ZipCache(saliency_scope="kv_head", value_param_scope="token_head", **SMALL),
        ZipCache(saliency_ratio=1.0, **SMALL),
    ],
    ids=["layer", "kv_head", "uniform"],
)
def test_left_padding_changes_no_bit(recipe: ZipCache) -> None:
    check_padding_invariance(recipe)


def test_the_padding_check_catches_statistics_over_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' code reduces over batch and tokens."""
    from tersor.lowbit import codecs

    parameters = codecs.affine_parameters

    def over_the_batch(x: Tensor, bits: int, dims: tuple[int, ...], **kw):
        shared = parameters(x, bits, (0, *dims), **kw)
        return tuple(p.expand(x.shape[0], *p.shape[1:]) for p in shared)

    monkeypatch.setattr(codecs, "affine_parameters", over_the_batch)
    with pytest.raises(AssertionError):
        check_padding_invariance(ZipCache(**SMALL))


# -- invariant 10 --------------------------------------------------------------------------------------------------

BATCH_OPERATIONS = {
    "reorder": (lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])), lambda x: x[[2, 0, 0]]),
    "repeat": (lambda layer: layer.batch_repeat_interleave(2), lambda x: x.repeat_interleave(2, 0)),
    "drop longest": (lambda layer: layer.batch_select_indices(torch.tensor([1, 2])), lambda x: x[[1, 2]]),
    "mask": (
        lambda layer: layer.batch_select_indices(torch.tensor([True, False, True])),
        lambda x: x[[0, 2]],
    ),
}


def check_batch_operation(operation, on_inputs) -> None:
    """The operation, then appending and flushing, equals the operation on the inputs first."""
    pads = [0, 9, 20]
    tensors = stream(3, 60)
    masks = [padding_mask(3, 40, pads)] + [padding_mask(3, i + 1, pads)[:, :, -1:] for i in range(40, 60)]

    def run(layer: CompressedLayer, tensors, masks, begin: int, stop: int) -> Tensor:
        if begin == 0:
            step(layer, *(x[:, :, :40] for x in tensors), mask=masks[0])
            begin = 40
        for i in range(begin, stop):
            output = step(layer, *(x[:, :, i : i + 1] for x in tensors), mask=masks[i - 39])
        return output

    after = CompressedLayer(ZipCache(**SMALL).method(), 0)
    run(after, tensors, masks, 0, 47)
    operation(after)
    later = tuple(on_inputs(x) for x in tensors)
    masks = [on_inputs(mask) for mask in masks]
    output = run(after, later, masks, 47, 60)
    before = CompressedLayer(ZipCache(**SMALL).method(), 0)
    expected = run(before, later, masks, 0, 60)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for got, reference in zip(after.dequantize(), before.dequantize(), strict=True):
        torch.testing.assert_close(got, reference)


@pytest.mark.parametrize("name", BATCH_OPERATIONS)
def test_batch_operations_commute_with_appending(name: str) -> None:
    check_batch_operation(*BATCH_OPERATIONS[name])


def test_the_batch_check_catches_a_buffer_only_reorder() -> None:
    def buffer_only(layer: CompressedLayer) -> None:
        order = torch.tensor([2, 0, 0])
        layer.buffer.keys, layer.buffer.values = layer.keys[order], layer.values[order]

    with pytest.raises(AssertionError):
        check_batch_operation(buffer_only, lambda x: x[[2, 0, 0]])


# -- invariant 11 --------------------------------------------------------------------------------------------------


def check_crop_in_the_buffer(crop) -> None:
    tensors, wrong = stream(2, 70), stream(2, 70, seed=9)
    plain = filled(ZipCache(**SMALL), tensors, 40, 44)
    cropped = filled(ZipCache(**SMALL), tensors, 40, 44)
    feed(cropped, wrong, 44, 48)
    crop(cropped, 4)
    assert cropped.get_seq_length() == plain.get_seq_length() == 44
    for layer in (plain, cropped):
        feed(layer, tensors, 44, 65)
    assert len(plain.segments) == 3
    for got, expected in zip(cropped.dequantize(), plain.dequantize(), strict=True):
        assert torch.equal(got, expected)


def test_crop_inside_the_buffer_leaves_no_trace() -> None:
    check_crop_in_the_buffer(lambda layer, count: layer.crop(-count))


def test_the_crop_check_catches_scores_left_behind() -> None:
    def keep_scores(layer: CompressedLayer, count: int) -> None:
        scores = copy.deepcopy(layer.buffer.scores)
        layer.crop(-count)
        layer.buffer.scores.rows = [row[..., : layer.waiting] for row in scores.rows]

    with pytest.raises(AssertionError):
        check_crop_in_the_buffer(keep_scores)


def test_crop_refuses_positive_numbers_and_zero_is_nothing() -> None:
    layer = filled(ZipCache(**SMALL), stream(1, 20), 16, 20)
    with pytest.raises(ValueError, match="negative"):
        layer.crop(1)
    before = [x.clone() for x in layer.dequantize()]
    layer.crop(0)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.dequantize(), strict=True))
    CompressedLayer(ZipCache().method(), 0).crop(-3)


def test_crop_into_segments_keeps_the_rest_readable() -> None:
    tensors = stream(2, 60)
    layer = filled(ZipCache(**SMALL), tensors, 40, 57)
    whole = layer.dequantize()
    layer.crop(-22)
    assert layer.get_seq_length() == 35
    assert not layer.is_croppable
    for got, expected in zip(layer.dequantize(), whole, strict=True):
        assert torch.equal(got, expected[:, :, :35])
    feed(layer, tensors, 35, 50)
    assert layer.get_seq_length() == 50
    layer.crop(-50)
    assert layer.get_seq_length() == 0
    assert not layer.segments


def test_recording_postpones_compression_until_crop() -> None:
    layer = CompressedLayer(ZipCache(**SMALL).method(), 0)
    layer.activate_past_recording()
    tensors = stream(1, 60)
    step(layer, *(x[:, :, :40] for x in tensors))
    assert not layer.segments
    assert layer.is_croppable
    layer.crop(-3)
    assert len(layer.segments) == 1
    assert layer.get_seq_length() == 37
    assert layer.segments[0].length == 37


# -- invariant 12 --------------------------------------------------------------------------------------------------


def check_lengths(make) -> None:
    layer, dynamic = make(), DynamicLayer()
    tensors = stream(2, 80)

    def both(name: str, *args) -> None:
        for each in (layer, dynamic):
            getattr(each, name)(*args)

    def compare() -> None:
        assert layer.get_seq_length() == dynamic.get_seq_length()
        for query in (1, 5):
            assert layer.get_mask_sizes(query) == dynamic.get_mask_sizes(query)
        assert layer.get_max_length() == dynamic.get_max_length()

    compare()
    for start, stop in ((0, 40), (40, 41), (41, 55), (55, 60)):
        part = tuple(x[:, :, start:stop] for x in tensors)
        dynamic.update(*part[1:])
        step(layer, *part)
        compare()
    for name, args in (
        ("crop", (-3,)),
        ("crop", (0,)),
        ("reorder_cache", (torch.tensor([1, 0]),)),
        ("batch_repeat_interleave", (2,)),
        ("batch_select_indices", (torch.tensor([0, 3]),)),
        ("crop", (-20,)),
        ("reset", ()),
    ):
        both(name, *args)
        compare()


def test_lengths_equal_the_dynamic_layer_after_every_operation() -> None:
    check_lengths(lambda: CompressedLayer(ZipCache(**SMALL).method(), 0))


def test_the_length_check_catches_counting_the_buffer_only() -> None:
    class BufferOnly(CompressedLayer):
        def get_seq_length(self) -> int:
            return self.waiting

    with pytest.raises((AssertionError, ValueError)):
        check_lengths(lambda: BufferOnly(ZipCache(**SMALL).method(), 0))


# -- invariant 13 --------------------------------------------------------------------------------------------------


def check_nothing_raw_survives(fill) -> None:
    tensors = stream(1, 64)
    prompt = weakref.ref(tensors[1].untyped_storage())
    layer = fill(tensors)
    del tensors
    gc.collect()
    assert prompt() is None
    expected = segment_bytes(
        [(group.positions.shape[-1], group.keys.bits) for group in layer.segments[0].groups],
        batch=1,
        kv_heads=KV_HEADS,
        key_dim=DIM,
        value_dim=DIM,
    )
    assert storage_bytes(layer.owned()) == expected


def test_owned_bytes_are_the_formula_and_the_prompt_is_freed() -> None:
    check_nothing_raw_survives(lambda tensors: filled(ZipCache(**SMALL), tensors, 64, 64))


def test_the_bytes_check_catches_a_view_of_the_prompt() -> None:
    def keep_a_view(tensors) -> CompressedLayer:
        layer = filled(ZipCache(**SMALL), tensors, 64, 64)
        layer.buffer.keys = tensors[1][:, :, :0]
        return layer

    with pytest.raises(AssertionError):
        check_nothing_raw_survives(keep_a_view)


# -- the rest of the contract --------------------------------------------------------------------------------------


def test_append_only_segments_never_change() -> None:
    tensors = stream(1, 400)
    layer = filled(ZipCache(streaming_gap=20), tensors, 100, 100)
    codes = layer.segments[0].groups[0].keys.codes.clone()
    before = layer.dequantize()[0]
    feed(layer, tensors, 100, 400)
    assert len(layer.segments) == 16
    assert torch.equal(codes, layer.segments[0].groups[0].keys.codes)
    assert torch.equal(layer.dequantize()[0][:, :, :100], before)


def test_multi_token_updates_after_the_prompt() -> None:
    """A second turn, long or short, attends as token-by-token decoding does."""
    raw = ZipCache(saliency_ratio=1.0, high_bits=16, **SMALL)
    tensors = stream(2, 90)
    reference = filled(raw, tensors, 40, 40)
    expected = torch.cat(feed(reference, tensors, 40, 90), dim=1)
    layer = filled(raw, tensors, 40, 40)
    parts = [(40, 45), (45, 75), (75, 90)]
    output = torch.cat([step(layer, *(x[:, :, a:b] for x in tensors)) for a, b in parts], dim=1)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert [segment.length for segment in layer.segments] == [40, 35, 15]


def test_recent_tokens_stay_raw() -> None:
    tensors = stream(1, 80)
    layer = filled(ZipCache(recent_fp_tokens=6, **SMALL), tensors, 40, 75)
    assert layer.waiting >= 6
    assert torch.equal(layer.keys, tensors[1][:, :, 75 - layer.waiting : 75])


def test_short_prompts_wait() -> None:
    layer = filled(ZipCache(), stream(1, 31), 31, 31)
    assert not layer.segments
    assert layer.waiting == 31


@pytest.mark.parametrize("prompt", [1, 5, 19])
def test_tiny_prompts_compress_without_nan(prompt: int) -> None:
    layer = filled(ZipCache(min_tokens_to_compress=1, streaming_gap=1), stream(1, prompt + 3), prompt, prompt + 3)
    assert len(layer.segments) == 4
    assert all(torch.isfinite(x).all() for x in layer.dequantize())


def test_a_fully_padded_row_stays_finite() -> None:
    tensors = stream(2, 50)
    layer = CompressedLayer(ZipCache(**SMALL).method(), 0)
    step(layer, *(x[:, :, :40] for x in tensors), mask=padding_mask(2, 40, [0, 40]))
    for i in range(40, 50):
        output = step(layer, *(x[:, :, i : i + 1] for x in tensors), mask=padding_mask(2, i + 1, [0, 40])[:, :, -1:])
    assert torch.isfinite(output).all()
    assert torch.isfinite(layer.dequantize()[0]).all()


def test_eviction_drops_tokens_from_attention() -> None:
    tensors = stream(1, 41)
    layer = filled(ZipCache(low_bits=0, saliency_ratio=0.5, high_bits=16, **SMALL), tensors, 40, 40)
    assert [group.positions.shape[-1] for group in layer.segments[0].groups] == [20]
    output = step(layer, *(x[:, :, 40:] for x in tensors))
    kept = [*layer.segments[0].groups[0].positions[0, 0].tolist(), 40]
    keys, values = (x[:, :, kept].repeat_interleave(2, 1) for x in tensors[1:])
    expected = nn.functional.scaled_dot_product_attention(tensors[0][:, :, 40:], keys, values)
    torch.testing.assert_close(output, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_deepcopy_and_pickle_continue_alike() -> None:
    tensors = stream(1, 70)
    layer = filled(ZipCache(**SMALL), tensors, 40, 47)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    expected = feed(layer, tensors, 47, 70)
    for clone in copies:
        for got, reference in zip(feed(clone, tensors, 47, 70), expected, strict=True):
            torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-5)


def test_reset_takes_another_batch_size() -> None:
    layer = filled(ZipCache(**SMALL), stream(3, 45), 40, 45)
    with pytest.raises(RuntimeError, match="holds a batch of 3"):
        layer.update(*stream(1, 1)[1:])
    layer.reset()
    assert layer.get_seq_length() == 0
    assert storage_bytes(layer.owned()) == 0
    step(layer, *stream(1, 40))
    assert layer.get_seq_length() == 40


def test_offload_between_update_and_attention_waits() -> None:
    tensors = stream(1, 50)
    layer, plain = (filled(ZipCache(**SMALL), tensors, 40, 45) for _ in range(2))
    for i in range(45, 50):
        part = tuple(x[:, :, i : i + 1] for x in tensors)
        layer.prefetch()
        k, v = layer.update(*part[1:])
        layer.offload()
        assert layer._offload_later
        output = tersor_attention(MODULE, part[0], k, v, None)[0]
        assert not layer._offload_later
        assert torch.equal(output, step(plain, *part))
    assert all(x.device.type == "cpu" for x in (layer.keys, layer.segments[0].channel_scale))


def test_without_the_attention_function_it_warns_and_stays_right() -> None:
    tensors = stream(1, 60)
    layer = CompressedLayer(ZipCache(saliency_ratio=1.0, high_bits=8, **SMALL).method(), 0)
    layer.update(*(x[:, :, :40] for x in tensors[1:]))
    with pytest.warns(UserWarning, match="does not use the attention function"):
        keys, _ = layer.update(*(x[:, :, 40:41] for x in tensors[1:]))
    assert len(layer.segments) == 1
    assert keys.shape[2] == 41
    torch.testing.assert_close(keys, tensors[1][:, :, :41], atol=0.05, rtol=0)
    evicting = CompressedLayer(ZipCache(low_bits=0, **SMALL).method(), 0)
    evicting.update(*(x[:, :, :40] for x in tensors[1:]))
    with pytest.raises(RuntimeError, match=r"method\.on"):
        evicting.update(*(x[:, :, 40:41] for x in tensors[1:]))


def test_training_through_the_cache_is_refused() -> None:
    module = Attention().train()
    query, keys, values = (x.requires_grad_() for x in stream(1, 40))
    layer = CompressedLayer(ZipCache().method(), 0)
    with pytest.raises(RuntimeError, match="no gradient"):
        tersor_attention(module, query, *layer.update(keys, values), None)


def test_non_finite_keys_are_named_when_asked_for() -> None:
    tensors = stream(1, 40)
    tensors[1][0, 0, 3, 3] = torch.nan
    layer = CompressedLayer(ZipCache(check_finite=True, **SMALL).method(), 5)
    with pytest.raises(ValueError, match="layer 5: keys hold NaN"):
        step(layer, *tensors)


def test_a_short_mask_is_refused() -> None:
    tensors = stream(1, 41)
    layer = filled(ZipCache(**SMALL), tensors, 40, 40)
    with pytest.raises(ValueError, match="covers 1 tokens but the cache holds 41"):
        step(layer, *(x[:, :, 40:] for x in tensors), mask=torch.ones(1, 1, 1, 1, dtype=torch.bool))


def test_streaming_error_of_the_prompt_does_not_grow() -> None:
    """Over 2,000 generated tokens; bytes per token approach the formula."""
    tensors = stream(1, 2300)
    layer = filled(ZipCache(), tensors, 300, 300)

    def prompt_error() -> float:
        return float((layer.dequantize()[0][:, :, :300] - tensors[1][:, :, :300]).square().mean())

    errors, sizes = [prompt_error()], []
    for stop in range(500, 2301, 200):
        feed(layer, tensors, stop - 200, stop)
        errors.append(prompt_error())
        sizes.append(storage_bytes(layer.segments))
    assert errors == [errors[0]] * len(errors)
    per_segment = segment_bytes([(60, 4), (40, 2)], batch=1, kv_heads=KV_HEADS, key_dim=DIM, value_dim=DIM)
    assert all(b - a == 2 * per_segment for a, b in itertools.pairwise(sizes))

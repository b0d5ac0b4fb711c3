"""One compressed layer, driven the way a model drives it."""

from __future__ import annotations

import pytest
import torch
from kv_driver import (
    MODULE,
    SMALL,
    feed,
    filled,
    group_rows,
    padding_mask,
    step,
    stream,
)
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tersor.bench.measure import storage_bytes
from tersor.kv.engine.attention import tersor_attention
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.zipcache import ZipCache


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


def test_a_fully_padded_row_stays_finite() -> None:
    tensors = stream(2, 50)
    layer = CompressedLayer(ZipCache(**SMALL).method(), 0)
    step(layer, *(x[:, :, :40] for x in tensors), mask=padding_mask(2, 40, [0, 40]))
    for i in range(40, 50):
        output = step(layer, *(x[:, :, i : i + 1] for x in tensors), mask=padding_mask(2, i + 1, [0, 40])[:, :, -1:])
    assert torch.isfinite(output).all()
    assert torch.isfinite(layer.dequantize()[0]).all()


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


def test_recording_ends_with_the_second_step_that_no_crop_follows_and_with_reset() -> None:
    layer, tensors = CompressedLayer(ZipCache(**SMALL).method(), 0), stream(1, 120)
    layer.activate_past_recording()
    step(layer, *(x[:, :, :40] for x in tensors))
    for draft in (40, 43):  # two rounds of three drafts
        step(layer, *(x[:, :, draft : draft + 3] for x in tensors))
        layer.crop(0)
    assert layer.record_past and layer.seen == 46
    feed(layer, tensors, 46, 80)
    assert not layer.record_past
    assert layer.waiting < SMALL["streaming_gap"]
    layer.activate_past_recording()
    layer.reset()
    step(layer, *(x[:, :, :40] for x in tensors))
    assert layer.segments


def test_a_prompt_before_the_first_crop_may_come_in_chunks() -> None:
    layer, tensors = CompressedLayer(ZipCache(**SMALL).method(), 0), stream(1, 60)
    layer.activate_past_recording()
    for start in (0, 20, 40):
        step(layer, *(x[:, :, start : start + 20] for x in tensors), mask=None if not start else rows_of(start, 20))
    assert layer.record_past and not layer.segments


def rows_of(start: int, new: int) -> Tensor:
    """The causal mask of ``new`` tokens after ``start`` others."""
    return torch.ones(start + new, start + new, dtype=torch.bool).tril()[None, None, start:]


@pytest.mark.parametrize(("least", "tokens"), [(32, 20), (64, 50), (200, 99), (200, 150), (500, 400)])
def test_nothing_is_compressed_before_the_least_number_of_tokens(least: int, tokens: int) -> None:
    tensors = stream(1, least + 1)
    layer = CompressedLayer(ZipCache(min_tokens_to_compress=least, streaming_gap=16).method(), 0)
    step(layer, *(x[:, :, :tokens] for x in tensors))
    feed(layer, tensors, tokens, least - 1)
    assert layer.waiting == least - 1
    feed(layer, tensors, least - 1, least)
    assert not layer.waiting


def test_scores_of_waiting_tokens_grow_with_their_number_and_not_its_square() -> None:
    tensors, taken = stream(1, 900), {}
    for recent in (200, 400, 800):
        recipe = ZipCache(recent_fp_tokens=recent, streaming_gap=20, probe_recent_ratio=0.5, probe_random_ratio=0.5)
        layer = filled(recipe, tensors, 40, recent + 60)
        assert layer.waiting >= recent
        taken[recent] = storage_bytes([layer.scores])
    assert taken[800] < 2.5 * taken[400] < 6.5 * taken[200]
    assert taken[800] < 30 * 4 * (800 + 60)  # a gap's worth of rows, and the sums


def test_keys_without_their_values_are_refused() -> None:
    for name, at in (("values", 1), ("keys", 0)):
        layer = CompressedLayer(ZipCache(**SMALL).method(), 0)
        query, keys, values = (x[:, :, :30] for x in stream(1, 30))
        returned = list(layer.update(keys, values))
        returned[at] = returned[at] * 1
        with pytest.raises(NotImplementedError, match=f"changes its {name} after the cache"):
            tersor_attention(MODULE, query, *returned, None)


def test_a_cache_goes_on_outside_of_the_inference_mode_that_began_it() -> None:
    """Its window is written in place, which torch refuses for what inference mode made."""
    tensors = stream(2, 70)
    expected = filled(ZipCache(**SMALL), tensors, 40, 70).dequantize()
    layer = CompressedLayer(ZipCache(**SMALL).method(), 0)
    with torch.inference_mode():
        step(layer, *(x[:, :, :40] for x in tensors))
        feed(layer, tensors, 40, 45)
    with torch.no_grad():
        feed(layer, tensors, 45, 70)
    assert all(torch.equal(got, own) for got, own in zip(layer.dequantize(), expected, strict=True))

"""Storage in two widths: errors, bytes, and what is gone."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from kv_driver import (
    DIM,
    HEADS,
    KV_HEADS,
    SMALL,
    feed,
    filled,
    step,
    stream,
)
from torch import nn

from tersor.bench.measure import storage_bytes
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.zipcache import ZipCache
from tersor.lowbit.bytes import segment_bytes


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
        layer.buffer.slots = tensors[1][:, :, :0], layer.buffer.slots[1]
        return layer

    with pytest.raises(AssertionError):
        check_nothing_raw_survives(keep_a_view)


def test_eviction_drops_tokens_from_attention() -> None:
    tensors = stream(1, 41)
    layer = filled(ZipCache(low_bits=0, saliency_ratio=0.5, high_bits=16, **SMALL), tensors, 40, 40)
    assert [group.positions.shape[-1] for group in layer.segments[0].groups] == [20]
    output = step(layer, *(x[:, :, 40:] for x in tensors))
    kept = [*layer.segments[0].groups[0].positions[0, 0].tolist(), 40]
    keys, values = (x[:, :, kept].repeat_interleave(2, 1) for x in tensors[1:])
    expected = nn.functional.scaled_dot_product_attention(tensors[0][:, :, 40:], keys, values)
    torch.testing.assert_close(output, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_non_finite_keys_are_named_when_asked_for() -> None:
    tensors = stream(1, 40)
    tensors[1][0, 0, 3, 3] = torch.nan
    layer = CompressedLayer(ZipCache(check_finite=True, **SMALL).method(), 5)
    with pytest.raises(ValueError, match="layer 5: keys hold NaN"):
        step(layer, *tensors)


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


def test_a_range_beyond_float16_gets_parameters_that_hold_it() -> None:
    """Found with the first segment and kept, so that later ones read nothing back."""
    tensors = tuple(tensor * size for tensor, size in zip(stream(1, 60), (1e-6, 1e6, 1e6), strict=True))
    layer = filled(ZipCache(**SMALL), tensors, 40, 60)
    assert len(layer.segments) == 3 and layer.param_dtype == torch.bfloat16
    for got, exact in zip(layer.dequantize()[:2], tensors[1:], strict=True):
        assert bool(torch.isfinite(got).all())
        assert float((got - exact).norm() / exact.norm()) < 0.5
    layer.reset()
    assert layer.param_dtype is None

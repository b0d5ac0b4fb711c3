"""What a pair of layers stores: lengths, errors, retained tokens, bytes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kv_driver import (
    MODULE,
    PAIR_RAW,
    PAIR_SMALL,
    filled_pair,
    new_pair,
    on,
    padding_mask,
    pair_step,
    pair_stream,
)
from torch import Tensor, nn

from tersor.bench.measure import storage_bytes
from tersor.kv.depth import merged_segment, merging
from tersor.kv.depth.merging import merge_pair
from tersor.kv.engine.attention import tersor_attention
from tersor.kv.minicache import MiniCache


def check_lengths(recipe: MiniCache, tolerance: float) -> None:
    tensors = pair_stream(2, 60)
    for layer, exact in zip(filled_pair(recipe, tensors, 60, 60), tensors, strict=True):
        for restored, x in zip(layer.dequantize(), exact[1:], strict=False):
            if recipe.granularity == "token":
                restored, x = (y.transpose(1, 2).flatten(2) for y in (restored, x))
            torch.testing.assert_close(restored.norm(dim=-1), x.norm(dim=-1), rtol=tolerance, atol=0)


@pytest.mark.parametrize("granularity", ["head", "token"])
@pytest.mark.parametrize("bits", [2, 4, 16])
def test_lengths_survive_storage(bits: int, granularity: str) -> None:
    common = {**PAIR_SMALL, "bits": bits, "granularity": granularity, "gamma": 0.0}
    check_lengths(MiniCache(**common), 1e-3)
    check_lengths(MiniCache(**common, param_dtype="float32"), 2e-6)


def test_the_length_check_catches_lengths_of_the_unrounded_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_the_norm(x: Tensor, granularity: str) -> SimpleNamespace:
        return SimpleNamespace(norm=lambda dim: torch.ones(x.shape[:-1]))

    monkeypatch.setattr(merged_segment, "as_units", forget_the_norm)
    with pytest.raises(AssertionError):
        check_lengths(MiniCache(**PAIR_SMALL, gamma=0.0, bits=2), 1e-3)


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_measured_error_is_the_predicted_one(granularity: str) -> None:
    recipe = MiniCache(**PAIR_RAW, granularity=granularity)
    tensors = pair_stream(1, 200)
    layers = filled_pair(recipe, tensors, 200, 200)
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
    tensors = pair_stream(1, 100)
    exact, rounded = (filled_pair(MiniCache(**{**PAIR_RAW, "bits": bits}), tensors, 100, 100) for bits in (16, 4))
    directions = merge_pair(tensors[0][1], tensors[1][1], 0.6).directions
    step_size = (directions.amax(2) - directions.amin(2)) / 15
    merged = exact[0].merged[0].groups[0].directions.positions[0, 0].long()
    for one, other, x in zip(exact, rounded, tensors, strict=True):
        error = (one.dequantize()[0] - other.dequantize()[0])[:, :, merged].norm(dim=-1)
        # Twice half a step in every channel: once for rounding, once for the length that makes up for it.
        bound = x[1].norm(dim=-1)[:, :, merged] * step_size.norm(dim=-1)[:, :, None]
        assert (error <= bound).all()


def test_planted_outliers_are_kept_bit_exact_in_both_layers() -> None:
    tensors = pair_stream(2, 100, spread=0.2)
    for sample, token in ((0, 0), (0, 31), (1, 77)):
        tensors[1][1][sample, :, token] *= -1
    layers = filled_pair(MiniCache(**PAIR_RAW), tensors, 100, 100)
    for layer, exact in zip(layers, tensors, strict=True):
        for restored, x in zip(layer.dequantize(), exact[1:], strict=False):
            for sample, token in ((0, 0), (0, 31), (1, 77)):
                assert torch.equal(restored[sample, :, token], x[sample, :, token])
    assert [group.valid.sum(-1).flatten().tolist() for group in layers[0].merged[0].apart[0].groups] == [[2, 1]]


@pytest.mark.parametrize("granularity", ["head", "token"])
@pytest.mark.parametrize("bits", [2, 16])
def test_fused_attention_equals_restoring_first(bits: int, granularity: str) -> None:
    tensors = pair_stream(2, 61)
    layers = filled_pair(MiniCache(**{**PAIR_RAW, "bits": bits}, granularity=granularity), tensors, 40, 60)
    dense = [layer.dequantize()[:2] for layer in layers]
    outputs = pair_step(layers, on(lambda x: x[:, :, 60:], tensors))
    for output, restored, (query, keys, values) in zip(outputs, dense, tensors, strict=True):
        k, v = (
            torch.cat([old, new[:, :, 60:]], 2).repeat_interleave(2, 1)
            for old, new in zip(restored, (keys, values), strict=True)
        )
        expected = nn.functional.scaled_dot_product_attention(query[:, :, 60:], k, v).transpose(1, 2)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


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
    tensors = pair_stream(3, 75)
    together = new_pair(recipe)
    pair_step(together, on(lambda x: x[:, :, :60], tensors), padding_mask(3, 60, pads))
    for i in range(60, 75):
        pair_step(together, on(lambda x, i=i: x[:, :, i : i + 1], tensors), padding_mask(3, i + 1, pads)[:, :, -1:])
    for sample, pad in enumerate(pads):
        own = on(lambda x, s=sample, p=pad: x[s : s + 1, :, p:], tensors)
        alone = filled_pair(recipe, own, 60 - pad, 75 - pad)
        assert len(alone[0].merged) == len(together[0].merged) == 2
        for mine, theirs in zip(alone[0].merged, together[0].merged, strict=True):
            for got, expected in zip(rows_of(theirs, sample), rows_of(mine, 0), strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("settings", [{}, {"granularity": "token"}, {"retention": "quantile", "gamma": 0.1}])
def test_left_padding_changes_no_bit(settings: dict) -> None:
    check_padding_invariance(MiniCache(**PAIR_SMALL, **settings))


def test_the_padding_check_catches_a_threshold_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    right = merging.retained

    def of_the_batch(distance: Tensor, **kw) -> Tensor:
        flat = {name: x.reshape(1, -1) if isinstance(x, Tensor) else x for name, x in kw.items()}
        return right(distance.reshape(1, -1), **flat).reshape(distance.shape)

    monkeypatch.setattr(merging, "retained", of_the_batch)
    with pytest.raises(AssertionError):
        check_padding_invariance(MiniCache(**PAIR_SMALL))


def test_a_fully_padded_row_stays_finite() -> None:
    tensors = pair_stream(2, 50)
    layers = new_pair(MiniCache(**PAIR_SMALL))
    pair_step(layers, on(lambda x: x[:, :, :40], tensors), padding_mask(2, 40, [0, 40]))
    for i in range(40, 50):
        mask = padding_mask(2, i + 1, [0, 40])[:, :, -1:]
        outputs = pair_step(layers, on(lambda x, i=i: x[:, :, i : i + 1], tensors), mask)
    assert all(torch.isfinite(x).all() for x in (*outputs, *layers[1].dequantize()))


def test_the_gap_changes_nothing_but_thresholds_and_parameters() -> None:
    """Raw and with nothing retained, merging token by token stores what merging ten together does."""
    tensors = pair_stream(1, 60)
    stores = [
        filled_pair(MiniCache(**{**PAIR_RAW, "streaming_gap": gap}, gamma=0.0), tensors, 40, 60) for gap in (1, 10)
    ]
    for one, other in zip(*stores, strict=True):
        assert one.waiting == other.waiting == 0
        for got, expected in zip(one.dequantize(), other.dequantize(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [{"gamma": 0.0}, {"gamma": 0.05, "retention": "quantile"}], ids=["none", "5 %"])
@pytest.mark.parametrize("granularity", ["head", "token"])
def test_bytes_are_the_formula(settings: dict, granularity: str) -> None:
    """One pair of the width h = 4096 at 16 bits; positions are not in the paper's formula."""
    tokens, heads, dim = 200, 32, 128
    layers = new_pair(MiniCache(**PAIR_SMALL, bits=16, granularity=granularity, **settings))
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

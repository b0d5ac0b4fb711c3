"""The tokens that wait: which stay raw, and what a crop takes back."""

from __future__ import annotations

import copy

import pytest
import torch
from kv_driver import (
    SMALL,
    feed,
    filled,
    stream,
)

from tersor.kv.engine.buffer import Buffer
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.selection.base import Chosen
from tersor.kv.zipcache import ZipCache


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
        layer.buffer.scores = scores

    with pytest.raises(AssertionError):
        check_crop_in_the_buffer(keep_scores)


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


def test_a_choice_among_the_newest_tokens_keeps_all_that_wait_before_them() -> None:
    valid = torch.tensor([[False, True, True, True, True, True], [True, True, True, True, True, True]])
    keys = torch.zeros(2, 1, 6, 4)
    buffer = Buffer(0, (keys, keys), 6, valid)
    newest = Chosen(torch.tensor([[[0, 2]], [[1, 0]]]), torch.tensor([[[True, True]], [[True, False]]]))
    others = Chosen(torch.tensor([[[1]], [[2]]]), None)
    buffer.decide((newest, others), torch.ones(2, 1, 3), torch.full((2, 3), 2.0))
    important, regular = buffer.decided
    assert [row.tolist() for row in important.rows()] == [[1, 2, 3, 5], [0, 1, 2, 4]]
    assert [row.tolist() for row in regular.rows()] == [[4], [5]]
    sums, counts = buffer.scores.totals(6)
    assert sums[:, 0].tolist() == [[0, 0, 0, 1, 1, 1]] * 2 and counts.tolist() == [[0, 0, 0, 2, 2, 2]] * 2

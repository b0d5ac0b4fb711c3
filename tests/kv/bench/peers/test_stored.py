"""Caches that store every token in another form."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build

from tersor.kv.bench.peers.cast import Cast
from tersor.kv.bench.peers.rotated import Rotated
from tersor.kv.bench.peers.stored import StoredLayer, stored_cache


def test_beyond_the_range_of_fp8_is_its_largest_number() -> None:
    form = Cast(torch.float8_e4m3fn)
    tokens = torch.tensor([[[[1e4, -1e4, 1.0]]]])
    assert form.decode(form.encode(tokens), 3).tolist() == [[[[448.0, -448.0, 1.0]]]]


@pytest.mark.parametrize("form", [Cast(torch.bfloat16), Cast(torch.float8_e4m3fn), Rotated(4)])
def test_batch_operations_act_on_what_is_stored(form) -> None:
    layer, twin = StoredLayer(form), StoredLayer(form)
    keys, values = (torch.randn(3, 2, 6, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    layer.update(keys, values)
    layer.reorder_cache(torch.tensor([2, 0, 1]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    layer.crop(-2)
    twin.update(keys[[2, 0], :, :4], values[[2, 0], :, :4])
    new = torch.ones(2, 2, 1, 8)
    for read, expected in zip(layer.update(new, new), twin.update(new, new), strict=True):
        assert torch.equal(read, expected)
    assert layer.get_seq_length() == 5
    assert layer.get_mask_sizes(1) == (6, 0)
    with pytest.raises(ValueError, match="negative"):
        layer.crop(1)
    layer.reset()
    assert layer.get_seq_length() == 0


def test_other_layers_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="sliding_attention"):
        stored_cache(build("gemma3").config, Rotated(4))

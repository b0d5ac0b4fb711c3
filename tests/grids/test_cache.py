"""The cache of appended tokens."""

from __future__ import annotations

import torch

from tersor.grids.cache import FrontCache


def test_tokens_come_back_in_the_order_in_which_they_were_fed() -> None:
    cache, fed = FrontCache(7, layers=2), torch.randn(2, 2, 3, 4, 7, 5)
    for first, last in ((0, 3), (3, 4), (4, 7)):
        assert cache.get_seq_length() == first
        for layer, (keys, values) in enumerate(fed):
            held = cache.update(keys[:, :, first:last], values[:, :, first:last], layer)
            assert all(torch.equal(one, each[:, :, :last]) for one, each in zip(held, (keys, values), strict=True))
    assert cache.memory is not None and cache.memory.shape == (4, 3, 4, 7, 5)

"""Operations on the batch reach every tensor that a layer owns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tersor.kv.engine.batch import BatchedLayer


class Pair(BatchedLayer):
    """Owns two tensors, one of them with an axis more."""

    def __init__(self) -> None:
        self.first = torch.arange(6).view(3, 2)
        self.second = torch.arange(12).view(3, 2, 2)

    def map_all(self, function: Callable[[Tensor], Tensor]) -> None:
        self.first, self.second = function(self.first), function(self.second)

    def get_seq_length(self) -> int:
        return 7

    def update(self, *args, **kwargs):
        raise NotImplementedError

    lazy_initialization = update


@pytest.mark.parametrize(
    ("operation", "argument", "samples"),
    [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_select_indices", torch.tensor([True, False, True]), [0, 2]),
    ],
)
def test_samples_are_moved_in_every_tensor(operation: str, argument, samples: list[int]) -> None:
    layer, before = Pair(), Pair()
    getattr(layer, operation)(argument)
    assert torch.equal(layer.first, torch.stack([before.first[sample] for sample in samples]))
    assert torch.equal(layer.second, torch.stack([before.second[sample] for sample in samples]))


def test_a_growing_layer_masks_what_it_holds_and_what_comes() -> None:
    layer = Pair()
    assert layer.get_mask_sizes(3) == (10, 0)
    assert layer.get_max_length() == -1
    assert not layer.is_sliding and not layer.is_compileable


def test_a_layer_that_stores_nothing_says_so() -> None:
    class Bare(Pair):
        map_all = BatchedLayer.map_all

    with pytest.raises(NotImplementedError, match="Bare stores nothing"):
        Bare().batch_repeat_interleave(2)

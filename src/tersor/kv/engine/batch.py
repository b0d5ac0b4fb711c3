"""What a cache layer answers to the library in the same way however it stores its tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from tersor._errors import UnsupportedError


class BatchedLayer(CacheLayerMixin):
    """A cache layer of growing length whose operations on the batch are one function of every tensor."""

    is_compileable = False
    is_sliding = False

    def map_all(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function`` to every tensor that the layer owns, all of which begin with the batch."""
        raise UnsupportedError(f"{type(self).__name__} stores nothing; override `map_all`")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.map_all(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map_all(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map_all(lambda x: x[indices.to(x.device), ...])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

"""A layer that has both attention and a linear state, such as Falcon-H1's: the attention is compressed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from tersor.kv.engine.layer import CompressedLayer


class HybridLayer(LinearAttentionAndFullAttentionLayer):
    """The library's linear state beside a compressed attention.

    Args:
        attention: The compressed layer.
        number_of_states: Linear states of the layer, as the library counts them.
    """

    def __init__(self, attention: CompressedLayer, number_of_states: int = 1, **settings: Any):
        self.attention = attention
        super().__init__(number_of_states=number_of_states, **settings)

    # What the library's layer keeps for its attention is the compressed layer's.
    keys = property(lambda self: self.attention.keys, lambda self, value: None)
    values = property(lambda self: self.attention.values, lambda self, value: None)
    is_initialized = property(lambda self: self.attention.is_initialized, lambda self, value: None)

    @property
    def record_past(self) -> bool:
        """Whether both parts wait for `crop`, see `CompressedLayer`."""
        return self.attention.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.attention.record_past = value

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        if args:
            self.attention.lazy_initialization(*args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.attention.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        return self.attention.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.attention.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return self.attention.get_max_length()

    @property
    def is_croppable(self) -> bool:
        return LinearAttentionLayer.is_croppable.fget(self) and self.attention.is_croppable

    def activate_past_recording(self) -> None:
        self.attention.activate_past_recording()

    def _both(self, name: str, *args: Any) -> None:
        getattr(LinearAttentionLayer, name)(self, *args)
        getattr(self.attention, name)(*args)

    def crop(self, tokens_to_remove: int) -> None:
        self._both("crop", tokens_to_remove)

    def reset(self) -> None:
        self._both("reset")

    def offload(self) -> None:
        self._both("offload")

    def prefetch(self) -> None:
        self._both("prefetch")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._both("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_states(lambda x: x.repeat_interleave(repeats, dim=0))
        self.attention.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_states(lambda x: x[indices.to(x.device), ...])
        self.attention.batch_select_indices(indices)

    def _map_states(self, function: Callable[[Tensor], Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = function(state)

"""A cache whose layers store every token in another form and read all of them back at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, get_layer_types_and_kwargs

from tersor._errors import TersorError, UnsupportedError
from tersor.kv.engine.batch import BatchedLayer

#: The stored form of some tokens: tensors ``[batch, kv_heads, tokens, *]``.
Stored = tuple[Tensor, ...]


class Form(Protocol):
    """How keys and values ``[batch, kv_heads, tokens, head_dim]`` are stored, token by token."""

    def encode(self, tokens: Tensor) -> Stored:
        """The stored form of ``tokens``."""

    def decode(self, stored: Stored, dim: int) -> Tensor:
        """Tokens of ``dim`` channels read back in float32."""


class StoredLayer(BatchedLayer):
    """Appends tokens in their stored form; new tokens are attended to as they came, before they are stored."""

    is_croppable = True

    def __init__(self, form: Form):
        super().__init__()
        self.form = form
        self.keys: Any = None
        self.values: Any = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self.form.encode(key_states[:, :, :0]), self.form.encode(value_states[:, :, :0])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[batch, kv_heads, new, head_dim]`` and return the whole sequence in model precision."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, self.keys = self._append(self.keys, key_states)
        values, self.values = self._append(self.values, value_states)
        return keys, values

    def _append(self, stored: Stored, new: Tensor) -> tuple[Tensor, Stored]:
        past = self.form.decode(stored, new.shape[-1]).to(new.dtype)
        pairs = zip(stored, self.form.encode(new), strict=True)
        return torch.cat([past, new], dim=2), tuple(torch.cat(pair, dim=2) for pair in pairs)

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else int(self.keys[0].shape[2])

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest ``-tokens_to_remove`` tokens."""
        if tokens_to_remove > 0:
            raise TersorError(f"crop({tokens_to_remove}): pass the number of tokens to remove as a negative number")
        kept = max(self.get_seq_length() + tokens_to_remove, 0)
        self.map_all(lambda x: x[:, :, :kept])

    def map_all(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = tuple(map(function, self.keys)), tuple(map(function, self.values))


def stored_cache(config: PreTrainedConfig, form: Form) -> Cache:
    """A cache of `StoredLayer`.

    Raises:
        NotImplementedError: For models with layers that are not full attention.
    """
    types, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    if others := set(types) - {"full_attention"}:
        raise UnsupportedError(f"this peer stores full-attention layers only, and the model has {sorted(others)}")
    return Cache(layers=[StoredLayer(form) for _ in types])

"""A prompt that a model reads once and that any number of caches then take, each as if the model had read it again.

It holds for methods that leave a prompt's attention dense: queries, keys and values do not depend on the cache then.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from tersor._compat import with_cache
from tersor._errors import UnsupportedError
from tersor.kv.engine.call import AttentionCall
from tersor.kv.engine.choices import Choices
from tersor.kv.engine.hybrid import HybridLayer
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.method import KVMethod
from tersor.kv.selection.ratio import RecentSelection
from tersor.kv.storage.mixed import MixedPrecisionStorage


class _Recorder(CompressedLayer):
    """Keeps what the attention function was asked."""

    def observe(self, call: AttentionCall, lse: Tensor | None = None) -> None:
        super().observe(call, lse)
        self.recorded = replace(call, mask=None)


@dataclass(frozen=True)
class _RecordingDepth:
    def check(self, choices: Choices) -> None:
        """Everything goes with it."""

    def build(self, choices: Choices, layers: list[int], config: PreTrainedConfig) -> dict[int, CompressedLayer]:
        return {index: _Recorder(choices, index) for index in layers}


#: The method whose session a model must be in while `record` and `replay` run.
RECORDER = KVMethod(
    name="recorder",
    selection=RecentSelection(ratio=1.0),
    storage=MixedPrecisionStorage(high_bits=16),
    depth=_RecordingDepth(),
    streaming_gap=None,
    min_tokens_to_compress=None,
)


@dataclass
class Tape:
    """What every layer did with one prompt.

    Args:
        calls: The attention call of each layer that can be compressed.
        others: The library's cache layer, filled, of each other layer.
    """

    calls: dict[int, AttentionCall]
    others: dict[int, Any]

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return next(iter(self.calls.values())).key.shape[2]


@torch.inference_mode()
def record(model: PreTrainedModel, ids: Tensor) -> Tape:
    """Read ``ids`` ``[batch, tokens]``, without padding, densely; the model must be in a session of `RECORDER`.

    Raises:
        NotImplementedError: For models with layers that hold attention and a linear state at once.
    """
    cache = RECORDER.cache(model.config)
    if any(isinstance(layer, HybridLayer) for layer in cache.layers):
        raise UnsupportedError(
            f"{type(model).__name__} has layers with both attention and a linear state, which cannot be recorded; take "
            "a method with its defaults for it"
        )
    model(ids, **with_cache(cache), logits_to_keep=1)
    layers = dict(enumerate(cache.layers))
    calls = {index: layer.recorded for index, layer in layers.items() if isinstance(layer, _Recorder)}
    return Tape(calls, {index: layer for index, layer in layers.items() if index not in calls})


@torch.inference_mode()
def replay(tape: Tape, cache: Cache) -> Cache:
    """Fill an empty ``cache`` with the recorded prompt, as reading it would."""
    for index, layer in tape.others.items():
        cache.layers[index] = copy.deepcopy(layer)
    for index, call in tape.calls.items():
        cache.update(call.key, call.value, index)
        layer = cache.layers[index]
        if isinstance(layer, CompressedLayer):
            layer.observe(call)
    return cache

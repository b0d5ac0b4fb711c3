"""Why ZipCache quantizes as it does: layouts of minima and steps under the stress that real caches put on them.

Reproduces the mechanism of the paper's quantizer table (groupwise, tokenwise, channelwise keys with
channel-separable values) on continuation loss. Keys and values are quantized and read back between prefill and
continuation; every stress is undone after reading back, so that the exact cache always gives the same loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from tersor.kv.bench.contenders import token_ids
from tersor.kv.bench.recall import BATCH, Scores, continuation_loss
from tersor.kv.selection.probes import seeded_generator
from tersor.kv.tape import RECORDER, record
from tersor.lowbit.codecs import affine_encode, channel_scale, encode_keys_channelwise, encode_values_channel_separable

Quantizer = Callable[[Tensor, int], Tensor]


def _read_back(x: Tensor, bits: int, dims: tuple[int, ...]) -> Tensor:
    return affine_encode(x, bits, dims, valid=None, param_dtype=torch.float16).decode()


def tokenwise(x: Tensor, bits: int) -> Tensor:
    """One pair per token over all heads and channels of ``[batch, kv_heads, tokens, dim]``."""
    return _read_back(x, bits, (-3, -1))


def groupwise(x: Tensor, bits: int, size: int = 16) -> Tensor:
    """One pair per token and ``size`` neighbouring channels."""
    groups = x.reshape(*x.shape[:2], -1, size)
    return _read_back(groups, bits, (-1,)).reshape(x.shape)


def channelwise(keys: Tensor, bits: int) -> Tensor:
    """One pair per channel over the tokens: what ZipCache does to keys."""
    return encode_keys_channelwise(keys, bits).decode()


def channel_separable(values: Tensor, bits: int) -> Tensor:
    """One pair per token after dividing by the channel scale: what ZipCache does to values."""
    scale = channel_scale(values)
    return encode_values_channel_separable(values, bits, scale).decode() * scale.float()


#: Name -> (quantizer of keys, quantizer of values).
LAYOUTS: dict[str, tuple[Quantizer, Quantizer]] = {
    "groupwise": (groupwise, groupwise),
    "tokenwise": (tokenwise, tokenwise),
    "channelwise K + tokenwise V": (channelwise, tokenwise),
    "channelwise K + channel-separable V": (channelwise, channel_separable),
}


@dataclass(frozen=True)
class Stress:
    """A change of the cache that an exact model would not notice: keys and values times ``scale`` plus ``shift``."""

    key_scale: Tensor | float = 1.0
    key_shift: Tensor | float = 0.0
    value_scale: Tensor | float = 1.0

    def quantize(self, keys: Tensor, values: Tensor, layout: str, bits: int) -> tuple[Tensor, Tensor]:
        """Apply the stress, quantize and read back, undo the stress."""
        quantize_keys, quantize_values = LAYOUTS[layout]
        keys = quantize_keys(keys * self.key_scale + self.key_shift, bits)
        values = quantize_values(values * self.value_scale, bits)
        return (keys - self.key_shift) / self.key_scale, values / self.value_scale


def stresses(model: PreTrainedModel, tokens: int, *, seed: int = 0) -> dict[str, Stress]:
    """Ways to stress caches of ``tokens`` tokens of a Llama-like ``model``.

    "outlier channels": every sixteenth channel 20 times as large. "key shift": one constant vector (standard
    deviation 20) on every key. "key bias": the same vector before the rotary embedding, as Qwen2 adds it, which
    makes it a sinusoid in the position.
    """
    config = model.config
    shape = (1, config.num_key_value_heads, 1, config.head_dim)
    channels = torch.ones(shape)
    channels[..., ::16] = 20.0
    bias = 20 * torch.randn(shape, generator=seeded_generator(seed))
    positions = torch.arange(tokens)[None]
    cos, sin = model.model.rotary_emb(bias, positions)
    half = config.head_dim // 2
    turned = torch.cat([-bias[..., half:], bias[..., :half]], -1)
    return {
        "plain": Stress(),
        "outlier channels": Stress(key_scale=channels, value_scale=channels),
        "key shift": Stress(key_shift=bias),
        "key bias": Stress(key_shift=bias * cos[:, None] + turned * sin[:, None]),
    }


@torch.inference_mode()
def score_layouts(
    model: PreTrainedModel,
    encode: Callable[[str], list[int]],
    text: str,
    *,
    n: int,
    bits: int,
    prefix: int = 384,
    continuation: int = 128,
    seed: int = 0,
) -> dict[str, dict[str, Scores]]:
    """Loss in nats of ``n`` continuations of ``text`` by stress and layout; layout ``"exact"`` quantizes nothing."""
    starts = np.random.default_rng([seed, 78]).integers(0, len(text) - prefix - continuation, size=n)
    windows = token_ids([text[s : s + prefix + continuation] for s in map(int, starts)], encode)
    variants = stresses(model, prefix - 1, seed=seed)
    scores = {name: {layout: Scores() for layout in ("exact", *LAYOUTS)} for name in variants}
    with RECORDER.on(model):
        for start in range(0, n, BATCH):
            batch = windows[start : start + BATCH]
            tape = record(model, batch[:, : prefix - 1])
            for name, stress in variants.items():
                for layout, score in scores[name].items():
                    cache = DynamicCache(config=model.config)
                    for index, call in tape.calls.items():
                        stored = (call.key, call.value)
                        if layout != "exact":
                            stored = stress.quantize(*stored, layout, bits)
                        cache.update(*stored, index)
                    score.add(continuation_loss(model, cache, batch[:, prefix - 1 :]), 0, 0)
    return scores

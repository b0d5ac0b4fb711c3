"""The cache that `model.generate` is given: compressed layers where that applies, the library's own elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, get_layer_types_and_kwargs

from tersor.bench.measure import storage_bytes
from tersor.kv.depth.merged_segment import PairedLayer
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.engine.tree import iter_tensors

if TYPE_CHECKING:
    from tersor.kv.method import KVMethod


class CompressedCache(Cache):
    """A transformers `Cache` whose full-attention layers are compressed by ``method``.

    Sliding-window, chunked, linear and KV-sharing layers are the library's own classes, untouched.

    Args:
        config: of the model; composite models are reduced to their text decoder.
        method: the KV method; its ``skip_layers`` stay at model precision.
        offloading: keep all layers but the current one on the CPU (CUDA only, as in transformers).

    Warns when every layer is such a one, so that nothing is compressed.

    Raises:
        NotImplementedError: for encoder-decoder models, latent attention (MLA), and models without attention.
    """

    def __init__(self, config: PreTrainedConfig, method: KVMethod, *, offloading: bool = False):
        if config.is_encoder_decoder:
            raise NotImplementedError(
                f"{type(config).__name__} is an encoder-decoder model; tersor compresses decoder-only caches"
            )
        text = config.get_text_config(decoder=True)
        if getattr(text, "kv_lora_rank", None) is not None:
            raise NotImplementedError(
                f"{type(text).__name__} caches one latent a token (multi-head latent attention), not keys and values; "
                "it is small already, use the library's own cache"
            )
        types, kwargs = get_layer_types_and_kwargs(text)
        chosen = compressible_layers(text, method.skip_layers)
        if not any("attention" in kind or "hybrid" in kind for kind in set(types) - {"linear_attention"}):
            raise NotImplementedError(
                f"{type(text).__name__} has no attention layer and so no KV cache (layer types: {sorted(set(types))})"
            )
        if not chosen:
            warnings.warn(
                f"{type(text).__name__} has no full-attention layer to compress (layer types: {sorted(set(types))}); "
                "its layers stay as the library keeps them",
                stacklevel=2,
            )
        compressed = method.depth.build(method, chosen, text)
        layers = [
            compressed[index] if index in compressed else DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs[index])
            for index, kind in enumerate(types)
        ]
        super().__init__(layers=layers, offloading=offloading)
        self.method = method

    def compressed_layers(self) -> list[CompressedLayer]:
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    def memory_footprint(self) -> int:
        """Bytes of every storage that the compressed layers own: codes, parameters, positions, buffers, scores."""
        return storage_bytes([layer.owned() for layer in self.compressed_layers()])

    def dense_footprint(self) -> int:
        """Bytes that a 16-bit dense cache of the same tokens would take in the compressed layers."""
        total = 0
        for layer in self.compressed_layers():
            if layer.is_initialized:
                batch, heads, _, key_dim = layer.keys.shape
                total += 2 * batch * heads * layer.get_seq_length() * (key_dim + layer.values.shape[-1])
        return total

    def compression_ratio(self) -> float:
        """`dense_footprint` over `memory_footprint`; 1.0 for an empty cache."""
        bytes_now = self.memory_footprint()
        return self.dense_footprint() / bytes_now if bytes_now else 1.0

    def dequantize(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, kv_heads, sequence, head_dim]`` in token order and model precision.

        Positions that are not stored (left padding, evicted tokens) are zero.

        Raises:
            ValueError: for a layer that is not compressed or holds nothing yet.
        """
        layer = self.layers[layer_idx] if 0 <= layer_idx < len(self.layers) else None
        if not isinstance(layer, CompressedLayer) or not layer.is_initialized:
            able = [each.layer_idx for each in self.compressed_layers() if each.is_initialized]
            raise ValueError(f"layer {layer_idx} holds no compressed tokens; layers that do: {able}")
        keys, values, _ = layer.dequantize()
        return keys, values

    def summary(self) -> dict[str, Any]:
        """Tokens, bytes and ratio, overall and by bit width, for reports and `tersor generate`.

        Where layers are merged, ``pairs`` has a row for each pair: similarity as found when merging, and bytes.
        """
        layers = [layer for layer in self.compressed_layers() if layer.is_initialized]
        by_bits: dict[str, int] = {}
        for layer in layers:
            for segment in layer.segments:
                for group in segment.groups:
                    name = "raw" if isinstance(group.keys, Tensor) else f"{group.keys.bits}-bit"
                    by_bits[name] = by_bits.get(name, 0) + group.positions.shape[-1]
            by_bits["buffer"] = by_bits.get("buffer", 0) + layer.waiting
        pairs = [layer.pair_row() for layer in layers if isinstance(layer, PairedLayer) and layer.is_first]
        return {
            "method": self.method.name,
            "tokens": self.get_seq_length(),
            "compressed_layers": len(layers),
            "other_layers": len(self.layers) - len(self.compressed_layers()),
            "cache_bytes": self.memory_footprint(),
            "fp16_bytes": self.dense_footprint(),
            "compression_ratio": self.compression_ratio(),
            "tokens_by_width": by_bits,
            **({"pairs": pairs} if pairs else {}),
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every owned tensor under a dotted name, in the canonical packed layout, e.g. for safetensors."""
        named = {}
        for layer in self.compressed_layers():
            for field in layer.owned_fields:
                prefix = f"layers.{layer.layer_idx}.{field}"
                named.update(dict(iter_tensors(getattr(layer, field), prefix)))
        return named


def compressible_layers(config: PreTrainedConfig, skip: Sequence[int] = ()) -> list[int]:
    """The full-attention layers of a text decoder, without ``skip`` and those whose cache other layers read."""
    types, _ = get_layer_types_and_kwargs(config)
    # A layer whose keys and values other layers read again must hand out the dense tensors.
    sharing = getattr(config, "kv_sharing_modes", None) or [None] * len(types)
    return [
        index
        for index, kind in enumerate(types)
        if kind == "full_attention" and sharing[index] is None and index not in skip
    ]

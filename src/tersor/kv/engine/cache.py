"""The cache that `model.generate` is given: compressed layers where that applies, the library's own elsewhere."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, get_layer_types_and_kwargs

from tersor._errors import TersorError, UnsupportedError
from tersor.bench.measure import storage_bytes
from tersor.kv.engine.choices import Choices
from tersor.kv.engine.hybrid import HybridLayer
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.engine.saving import SavedCache, SavedCacheError, architecture, check_whole, weights_sample
from tersor.kv.engine.tree import iter_tensors

#: Makes a cache layer for each of the model's layers that are compressed.
BuildLayers = Callable[[Choices, list[int], PreTrainedConfig], dict[int, CompressedLayer]]


#: Name of the saved tokens in a file.
INPUT_IDS = "input_ids"
#: Where a `HybridLayer` has its compressed attention.
INNER = "attention"


class NothingToCompressError(UnsupportedError):
    """The model keeps no keys and values that a method could compress."""


class CompressedCache(Cache):
    """A transformers `Cache` whose full-attention layers are compressed.

    Sliding-window, chunked, linear and KV-sharing layers are the library's own classes, untouched; of layers that have
    both, the attention is compressed.

    Args:
        config: Configuration of the model; composite models are reduced to their text decoder.
        choices: How to compress; its ``skip_layers`` stay at model precision.
        build: Makes the layers that are compressed, `Depth.build`.
        offloading: Keep all layers but the current one on the CPU (CUDA only, as in transformers).

    Raises:
        NotImplementedError: For encoder-decoder models, latent attention (MLA), and models without full attention.
    """

    def __init__(self, config: PreTrainedConfig, choices: Choices, build: BuildLayers, *, offloading: bool = False):
        if config.is_encoder_decoder:
            raise UnsupportedError(
                f"{type(config).__name__} is an encoder-decoder model; tersor compresses decoder-only caches"
            )
        text = config.get_text_config(decoder=True)
        if getattr(text, "kv_lora_rank", None) is not None:
            raise UnsupportedError(
                f"{type(text).__name__} caches one latent a token (multi-head latent attention), not keys and values; "
                "it is small already, use the library's own cache"
            )
        types, kwargs = get_layer_types_and_kwargs(text)
        chosen = compressible_layers(text, choices.skip_layers)
        if not any("attention" in kind or "hybrid" in kind for kind in set(types) - {"linear_attention"}):
            raise NothingToCompressError(
                f"{type(text).__name__} has no attention layer and so no KV cache (layer types: {sorted(set(types))})"
            )
        if not chosen:
            skipped = f", skip_layers={choices.skip_layers}" if choices.skip_layers else ""
            raise NothingToCompressError(
                f"{type(text).__name__} has no full-attention layer to compress (layer types: {sorted(set(types))}"
                f"{skipped}); the library's own cache is what it needs"
            )
        compressed = build(choices, chosen, text)
        for index in chosen[1:]:
            compressed[index].speaks = False
        layers = [_layer(kind, kwargs[index], compressed.get(index)) for index, kind in enumerate(types)]
        super().__init__(layers=layers, offloading=offloading)
        self.choices, self.config = choices, config
        #: Tokens that the cache was saved with, int64 ``[batch, tokens]``; None unless it was loaded with some.
        self.input_ids: Tensor | None = None
        # The model that runs with the cache, and the sample of weights that a loaded one must have.
        self._model: weakref.ref[PreTrainedModel] | None = None
        self._weights: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        # Of the same model, whose configuration is shared.
        shared = {"_model": self._model, "config": self.config}
        clone.__dict__.update({name: copy.deepcopy(own, memo) for name, own in self.__getstate__().items()} | shared)
        return clone

    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers that are compressed, in the model's order."""
        own = [layer.attention if isinstance(layer, HybridLayer) else layer for layer in self.layers]
        return [layer for layer in own if isinstance(layer, CompressedLayer)]

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
            ValueError: For a layer that is not compressed or holds nothing yet.
        """
        able = {each.layer_idx: each for each in self.compressed_layers() if each.is_initialized}
        if layer_idx not in able:
            raise TersorError(f"layer {layer_idx} holds no compressed tokens; layers that do: {list(able)}")
        keys, values, _ = able[layer_idx].dequantize()
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
        pairs = [row for layer in layers if (row := layer.summary()) is not None]
        return {
            "method": self.choices.name,
            "tokens": self.get_seq_length(),
            "compressed_layers": len(layers),
            "other_layers": len(self.layers) - len(self.compressed_layers()),
            "cache_bytes": self.memory_footprint(),
            "fp16_bytes": self.dense_footprint(),
            "compression_ratio": self.compression_ratio(),
            "tokens_by_width": by_bits,
            **({"pairs": pairs} if pairs else {}),
        }

    def meet(self, model: PreTrainedModel) -> None:
        """Take note of the model that is about to run with this cache.

        Raises:
            ValueError: If the cache was loaded and other weights have filled it.
        """
        if self._model is not None and self._model() is model:
            return
        if self._weights is not None:
            if self._weights != weights_sample(model):
                raise SavedCacheError(
                    f"the loaded cache was filled by other weights than those of this {type(model).__name__}, or in "
                    "another precision; load the model that filled it"
                )
            self._weights = None
            for layer in self.compressed_layers():
                layer.serve(model)
        self._model = weakref.ref(model)

    def save(self, path: str | Path, *, input_ids: Tensor | None = None) -> None:
        """Write the cache as one safetensors file, for `load`; nothing in it is a pickle.

        Args:
            path: The file; an older one is replaced at once or not at all.
            input_ids: The tokens that the cache has read, int64 ``[batch, tokens]``, to go on from after loading; they
                may be one more than it holds, as after `generate`.

        Raises:
            ValueError: If no model has filled the cache inside a session, or for another number of tokens.
        """
        model = None if self._model is None else self._model()
        tokens = self.get_seq_length()
        if not tokens or (model is None and self._weights is None):
            raise SavedCacheError(
                "only a cache that a model has filled inside `with method.on(model):`, and whose model is still there, "
                "can be saved: the file is bound to the model's weights"
            )
        if input_ids is not None and input_ids.shape[1] not in (tokens, tokens + 1):
            raise SavedCacheError(
                f"input_ids are {input_ids.shape[1]} tokens a row, but the cache has read {tokens}; pass those that it "
                "has read, with the one that was written last or without it"
            )
        saved = SavedCache(
            self.choices.recipe,
            repr(self.choices),
            architecture(self.config),
            self._weights if model is None else weights_sample(model),
            [],
        )
        for index, layer in enumerate(self.layers):
            saved.layers.append(saved.pack(_state(layer), f"layers.{index}"))
        if input_ids is not None:
            saved.tensors[INPUT_IDS] = input_ids.detach().cpu().clone()
        saved.write(path)

    @classmethod
    def load(
        cls,
        path: str | Path | SavedCache,
        config: PreTrainedConfig,
        method: Choices,
        *,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Read what `save` wrote; `tersor.load_cache` finds the method of a recipe in the file.

        The first forward checks that the model has the weights that filled the cache, by a sample of each parameter.

        Args:
            path: The file, or what was read from it.
            config: Configuration of the model that will go on from it.
            method: The choices that made the cache.
            device: Where the tensors go.

        Raises:
            ValueError: A `SavedCacheError` for a file that is missing, damaged, of a later version, or of another model
                or method.
        """
        saved = path if isinstance(path, SavedCache) else SavedCache.read(path, device)
        saved.check_model(config)
        if repr(method) != saved.method:
            raise SavedCacheError(
                f"{saved.path} was made by other settings: {saved.method} there, {method!r} here; save it again"
            )
        made: Any = method
        cache: Self = made.cache(config)
        cache._weights, cache.input_ids = saved.weights, saved.tensors.pop(INPUT_IDS, None)
        try:
            for layer, packed in zip(cache.layers, saved.layers, strict=True):
                _restore(layer, saved, packed, device)
            for each in cache.compressed_layers():
                check_whole(each)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise SavedCacheError(f"{saved.path} holds no cache of this shape ({error!r}); save it again") from None
        return cache

    def state_dict(self) -> dict[str, Tensor]:
        """Every owned tensor under a dotted name, in the canonical packed layout, e.g. for safetensors."""
        named: dict[str, Tensor] = {}
        for layer in self.compressed_layers():
            for name, node in layer.owned().items():
                named.update(iter_tensors(node, f"layers.{layer.layer_idx}.{name}"))
        return named


def _state(layer: Any) -> dict[str, Any]:
    """What a layer of the cache knows: a compressed one says it itself, the library's own hold plain values."""
    if isinstance(layer, CompressedLayer):
        return layer.state()
    return {name: _state(each) if name == INNER else each for name, each in vars(layer).items()}


def _restore(layer: Any, saved: SavedCache, packed: Any, device: torch.device | str) -> None:
    """Give a new layer the packed `_state` of an old one."""
    if isinstance(layer, CompressedLayer):
        layer.restore(saved.unpack(packed, {node.__name__: node for node in layer.NODES}, device))
        return
    for name, own in packed["dict"]:
        if name == INNER:
            _restore(getattr(layer, name), saved, own, device)
        else:
            setattr(layer, name, saved.unpack(own, {}, device))


def _layer(kind: str, settings: dict[str, Any], compressed: CompressedLayer | None) -> Any:
    """The cache layer of one of the model's layers."""
    if compressed is None:
        return DYNAMIC_LAYER_TYPE_MAPPING[kind](**settings)
    return HybridLayer(compressed, **settings) if kind == "hybrid" else compressed


def layer_types(config: PreTrainedConfig) -> list[str]:
    """The library's name for what each layer of a text decoder caches."""
    types: list[str] = get_layer_types_and_kwargs(config)[0]
    return types


def compressible_layers(config: PreTrainedConfig, skip: Sequence[int] = ()) -> list[int]:
    """The full-attention layers of a text decoder, without ``skip`` and those whose cache other layers read."""
    types = layer_types(config)
    # A layer whose keys and values other layers read again must hand out the dense tensors.
    sharing = getattr(config, "kv_sharing_modes", None) or []
    sharing = sharing if "reuse" in sharing else [None] * len(types)
    return [
        index
        for index, kind in enumerate(types)
        if kind in ("full_attention", "hybrid") and sharing[index] is None and index not in skip
    ]

"""Compressed caches as files: safetensors and one JSON document, bound to a model's shapes and weights.

The document holds what a layer knows besides its tensors. No class and no code is named by a file but the few plain
dataclasses that a layer stores its tokens in, so that reading one executes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tersor._errors import TersorError
from tersor._weights import save_tensors

#: Version of the format; a file of a later one is refused.
VERSION = 1
#: Name of the JSON document, and of the SHA-256 over it and the tensors, in the file's metadata.
DOCUMENT, CHECKSUM = "tersor_cache", "sha256"
#: Fields of a `SavedCache` that its document holds.
IN_DOCUMENT = ("recipe", "method", "model", "weights", "layers")
#: Fields of a text decoder's configuration that decide what its keys and values mean.
ARCHITECTURE = (
    *("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "layer_types", "sliding_window", "rope_parameters"),
)
#: Numbers of each parameter that a model is known by.
SAMPLE = 1024


class SavedCacheError(TersorError):
    """A file that holds no cache for this model, or none at all; the message says why."""


@dataclass
class SavedCache:
    """What a file holds.

    Args:
        recipe: The settings that made the cache, for `tersor.kv.settings.recipe_from_json`; None for choices of
            one's own.
        method: All choices as text, by which two methods are compared.
        model: `architecture` of the model.
        weights: `weights_sample` of the model that filled the cache; None where no session told which it was.
        layers: What each layer of the model knows, as the layers themselves give it.
        tensors: All tensors by name.
        path: Where it was read from, for messages.
    """

    recipe: str | None
    method: str
    model: dict[str, Any]
    weights: str | None
    layers: list[Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    path: str = ""

    def __post_init__(self) -> None:
        self._known: dict[int, tuple[str, Tensor]] = {}

    def write(self, path: str | Path) -> None:
        """Write the file; readers see the old one or the whole new one."""
        settings = {name: getattr(self, name) for name in IN_DOCUMENT}
        document = json.dumps({"version": VERSION, **settings})
        save_tensors(
            Path(path), self.tensors, metadata={DOCUMENT: document, CHECKSUM: _checksum(document, self.tensors)}
        )

    @classmethod
    def read(cls, path: str | Path, device: torch.device | str) -> SavedCache:
        """Read a file; tensors go to ``device``.

        Raises:
            ValueError: A `SavedCacheError` for a file that is missing, damaged, of a later version or of another kind.
        """
        with _opened(path) as file:
            document, settings = _document(file, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checksum = file.metadata().get(CHECKSUM)
        if _checksum(document, tensors) != checksum:
            raise SavedCacheError(f"{path} is damaged: its checksum does not fit its content; save it again")
        return cls(
            **{name: settings[name] for name in IN_DOCUMENT},
            tensors={name: tensor.to(device) for name, tensor in tensors.items()},
            path=str(path),
        )

    def check_model(self, config: PreTrainedConfig) -> None:
        """Raise a `SavedCacheError` that names the fields in which ``config`` is another model's."""
        own = architecture(config)
        if differing := [name for name in ARCHITECTURE if own.get(name) != self.model.get(name)]:
            name = differing[0]
            raise SavedCacheError(
                f"{self.path} is the cache of another model: {', '.join(differing)} differ "
                f"({name} {self.model.get(name)!r} there, {own.get(name)!r} here); load it for the model that filled it"
            )

    def pack(self, node: Any, name: str) -> Any:
        """``node`` as JSON takes it; its tensors are kept under dotted names that begin with ``name``."""
        if isinstance(node, Tensor):
            # What two nodes share is kept once; the tensor itself too, so that its identity stays its own.
            name, _ = self._known.setdefault(id(node), (name, node))
            self.tensors[name] = node.detach().cpu().clone()
            return {"tensor": name}
        if isinstance(node, torch.dtype):
            return {"dtype": str(node).removeprefix("torch.")}
        if isinstance(node, torch.device):
            return {"device": True}
        if isinstance(node, list | tuple):
            return {type(node).__name__: [self.pack(each, f"{name}.{index}") for index, each in enumerate(node)]}
        if isinstance(node, Mapping):
            return {"dict": [[key, self.pack(each, f"{name}.{key}")] for key, each in node.items()]}
        if is_dataclass(node):
            own = {each.name: self.pack(getattr(node, each.name), f"{name}.{each.name}") for each in fields(node)}
            return {"node": type(node).__name__, "fields": own}
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise SavedCacheError(f"{name} is a {type(node).__name__}, which no file can hold; use the model's own cache")

    def unpack(self, packed: Any, nodes: Mapping[str, type], device: torch.device | str) -> Any:
        """What `pack` was given; ``nodes`` are the dataclasses that may be in it, and tensors are on ``device``."""
        if not isinstance(packed, dict):
            return packed
        if "tensor" in packed:
            return self.tensors[packed["tensor"]]
        if "dtype" in packed:
            return getattr(torch, packed["dtype"])
        if "device" in packed:
            return torch.device(device)
        if "node" in packed:
            own = {name: self.unpack(each, nodes, device) for name, each in packed["fields"].items()}
            return nodes[packed["node"]](**own)
        if "dict" in packed:
            return {key: self.unpack(each, nodes, device) for key, each in packed["dict"]}
        kind, entries = next(iter(packed.items()))
        return {"list": list, "tuple": tuple}[kind](self.unpack(each, nodes, device) for each in entries)


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """The safetensors file; whatever is wrong with its bytes becomes a `SavedCacheError`."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except SavedCacheError:
        raise
    except FileNotFoundError:
        raise SavedCacheError(f"{path}: no such file") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise SavedCacheError(f"{path} is damaged or no safetensors file ({error}); save it again") from None


def _document(file: Any, path: str | Path) -> tuple[str, dict[str, Any]]:
    """The JSON document of a file, as text and read."""
    document = (file.metadata() or {}).get(DOCUMENT)
    if document is None:
        raise SavedCacheError(f"{path} is no cache that tersor saved; give a file of cache.save")
    settings = json.loads(document)
    if settings.get("version") != VERSION:
        raise SavedCacheError(
            f"{path} is in format {settings.get('version')}, and this release of tersor reads format {VERSION}; load "
            "it with the release that saved it, or save it again"
        )
    return document, settings


def architecture(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a model's text decoder that decide what its keys and values mean, as JSON gives them back."""
    text = config.get_text_config(decoder=True)
    named = {name: getattr(text, name, None) for name in ARCHITECTURE}
    known: dict[str, Any] = json.loads(json.dumps(named, default=str))
    return known


def check_whole(layer: Any) -> None:
    """Raise `ValueError` unless a `CompressedLayer` holds its whole sequence, each token in its place."""
    stop = 0
    for segment in layer.segments:
        places = [group.positions for group in segment.groups if group.positions.numel()]
        inside = all(segment.start <= int(x.min()) and int(x.max()) < segment.start + segment.length for x in places)
        if segment.start != stop or not inside:
            raise TersorError(f"layer {layer.layer_idx}: a segment holds other tokens than its own")
        stop += segment.length
    if stop + layer.waiting != layer.seen:
        raise TersorError(f"layer {layer.layer_idx} holds {stop + layer.waiting} of {layer.seen} tokens")


def weights_sample(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and `SAMPLE` evenly spaced numbers of each parameter of a model.

    It tells fine-tuned models apart in milliseconds; it does not see a single number that was changed elsewhere.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            numbers = parameter.detach().reshape(-1)
            digest.update(_bytes(numbers[:: max(1, len(numbers) // SAMPLE)]))
    return digest.hexdigest()


def _checksum(document: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(document.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """The numbers of a tensor as a buffer of bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()

"""Weights of the authors' checkpoints: found in their files, and loaded only if every name and shape is right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor._errors import TersorError


def read_weights(path: str | Path, keys: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a ``.pt`` file, mapped rather than loaded, and without executing anything from it.

    ``keys``: where trainers put the weights; the first one that is there counts.

    Raises:
        ValueError: If the file holds no state dict.
    """
    loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for key in keys:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    return check_tensors(loaded, path)


def check_tensors(loaded: Any, path: str | Path) -> dict[str, Tensor]:
    """``loaded`` as it is, if it is a state dict; raises `ValueError` otherwise."""
    if not isinstance(loaded, dict) or not all(isinstance(each, Tensor) for each in loaded.values()):
        raise TersorError(f"{path} holds no state dict of tensors")
    return loaded


def is_state(name: str) -> bool:
    """Whether a tensor of this name is no weight: rotary angles, or what sampling left behind in the model."""
    return name in ("freqs_cis", "causal_mask") or ".kv_cache." in name


def load_strictly(model: nn.Module, weights: dict[str, Tensor], path: str | Path, what: str) -> None:
    """Give ``weights`` to a model on the meta device, so that a wrong file costs no memory.

    Raises:
        ValueError: If names or shapes differ; the message lists them.
    """
    expected = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    found = {name: tuple(each.shape) for name, each in weights.items()}
    if expected != found:
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        shapes = sorted(
            f"{name}: {found[name]}, not {expected[name]}"
            for name in expected.keys() & found.keys()
            if found[name] != expected[name]
        )
        raise TersorError(f"{path} is no {what}: missing {missing}, unknown {extra}, other shapes {shapes}")
    # Copies, so that the model does not keep the file mapped.
    model.load_state_dict({name: each.clone() for name, each in weights.items()}, assign=True)

"""Which tensors a delta relies on, by content: two hashes of each tensor of its base.

The short hash is over the shape and at most `SAMPLED` evenly spaced numbers. `ExpertHost.load_expert` and the commands
compare it, because it reads little. It does not see a change that lies between the numbers of a larger tensor; the full
hash does, and `tersor experts verify --full` compares that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tersor.experts.config import BaseMismatchError
from tersor.experts.sources import Source

SAMPLED = 1 << 16
#: Short and full hash by name of a tensor.
Hashes = dict[str, tuple[str, str]]


def tensor_hash(tensor: Tensor, *, full: bool) -> str:
    """32 hexadecimal digits of SHA-256 over shape and numbers.

    Floating-point numbers are hashed as float32, so a checkpoint in 16 bits and the same weights loaded in 32 agree.
    """
    flat = tensor.detach().reshape(-1)
    if not full and flat.numel() > SAMPLED:
        flat = flat[torch.arange(SAMPLED, device=flat.device) * flat.numel() // SAMPLED]
    flat = flat.float() if flat.is_floating_point() else flat.long()
    digest = hashlib.sha256(f"{list(tensor.shape)}".encode())
    digest.update(flat.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:32]


def tensor_hashes(source: Source) -> Hashes:
    """Both hashes of every tensor of a model; raises `TersorError` for one that is missing or not finite."""
    return {
        name: (tensor_hash(tensor, full=False), tensor_hash(tensor, full=True))
        for name in source.names()
        for tensor in (source.read(name),)
    }


def content_hash(parts: Iterable[Any]) -> str:
    """One SHA-256 over what `repr` gives of each part, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part!r}\n".encode())
    return digest.hexdigest()


def model_hash(hashes: Mapping[str, tuple[str, str]]) -> str:
    """One hash of a whole model, from the full hashes of its tensors."""
    return content_hash((name, hashes[name][1]) for name in sorted(hashes))


def check_base(base: Source, expected: Mapping[str, tuple[str, str]], made_against: str, *, full: bool) -> None:
    """See that ``base`` has the tensors that a delta relies on.

    Args:
        base: The model that shall serve the delta.
        expected: Hashes of the base that it was made against.
        made_against: That base's name.
        full: Whether every number is compared, or `SAMPLED` of a tensor.

    Raises:
        BaseMismatchError: Naming the first tensor that differs, or a buffer that is not what the configuration says.
    """
    there = set(base.names())
    for name, hashes in expected.items():
        if name not in there:
            what = "is missing here"
        elif tensor_hash(base.find(name), full=full) != hashes[full]:
            what = "differs here"
        else:
            continue
        raise BaseMismatchError(
            f"the delta was made against {made_against}, {base.name} is another model ({name} {what}); "
            "give that base, in its precision"
        )
    base.check_buffers()

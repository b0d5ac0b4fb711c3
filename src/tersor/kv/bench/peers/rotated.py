"""Four bits after a rotation, as serving engines quantize without calibration.

A Hadamard matrix spreads an outlier channel over all of them, after which one minimum and step per token and head do;
the idea is QuaRot's (arXiv 2404.00456). Keys are rotated after the rotary embedding, so nothing can be folded into
the weights and reading rotates back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tersor._errors import TersorError
from tersor.kv.bench.peers.stored import Stored
from tersor.lowbit.codecs import affine_encode
from tersor.lowbit.codes import AffineCodes


@cache
def hadamard(order: int) -> Tensor:
    """Sylvester's matrix over the square root of its order: symmetric and orthogonal, so it is its own inverse.

    Raises:
        ValueError: Unless ``order`` is a power of two.
    """
    if order < 1 or order & (order - 1):
        raise TersorError(f"order={order} must be a power of two; pad the channels")
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * math.sqrt(1 / order)


def padded(dim: int) -> int:
    """The smallest power of two that holds ``dim`` channels."""
    return 1 << (dim - 1).bit_length()


def rotate(tokens: Tensor) -> Tensor:
    """``tokens`` ``[..., dim]`` in float32, padded with zeros to a power of two and rotated."""
    order = padded(tokens.shape[-1])
    wide = torch.nn.functional.pad(tokens.float(), (0, order - tokens.shape[-1]))
    return wide @ hadamard(order).to(tokens.device)


def rotate_back(rotated: Tensor, dim: int) -> Tensor:
    """Invert `rotate`."""
    return (rotated @ hadamard(rotated.shape[-1]).to(rotated.device))[..., :dim]


@dataclass(frozen=True)
class Rotated:
    """Rotated tokens in ``bits``, with a minimum and step per token and head in float16."""

    bits: int = 4

    def encode(self, tokens: Tensor) -> Stored:
        coded = affine_encode(rotate(tokens), self.bits, (-1,), valid=None, param_dtype=torch.float16)
        return coded.codes, coded.minimum, coded.step

    def decode(self, stored: Stored, dim: int) -> Tensor:
        codes, minimum, step = stored
        return rotate_back(AffineCodes(codes, minimum, step, self.bits, padded(dim)).decode(), dim)

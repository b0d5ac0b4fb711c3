"""Affine codes and the precisions that they are computed and stored in: what codecs write and kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.lowbit.packing import unpack_half_split


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision that minima, steps and roundings are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class AffineCodes:
    """Packed codes with the parameters that read them."""

    codes: Tensor
    """uint8, packed along the last axis."""
    minimum: Tensor
    """In storage precision, broadcastable against the unpacked codes."""
    step: Tensor
    """As ``minimum``."""
    bits: int
    dim: int
    """Channels before packing."""

    def unpack(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Codes of tokens ``start:stop`` as uint8 ``[..., tokens, dim]``."""
        return unpack_half_split(self.codes[..., start:stop, :], self.bits, self.dim)

    def decode(self) -> Tensor:
        """``u * step + minimum`` in the compute precision of the parameters."""
        dtype = compute_dtype(self.minimum.dtype)
        return self.unpack().to(dtype) * self.step.to(dtype) + self.minimum.to(dtype)


def storage_dtype(wanted: torch.dtype, largest: Tensor) -> torch.dtype:
    """``wanted``, or bfloat16 where a float16 could not hold ``largest``: a range must never overflow."""
    if wanted == torch.float16 and bool(largest > torch.finfo(torch.float16).max):
        return torch.bfloat16
    return wanted

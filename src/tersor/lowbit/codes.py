"""Affine codes and the precisions that they are computed and stored in: what codecs write and kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.lowbit.packing import unpack_half_split

#: How much larger than what was seen a parameter may be.
HEADROOM = 16


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


def storage_dtype(wanted: torch.dtype, *numbers: Tensor) -> torch.dtype:
    """``wanted``, or bfloat16 where a float16 might not hold what is made of numbers like these.

    That is `HEADROOM` times the largest of them: their ranges, lengths, and numbers that come later, for which nothing
    is read back.
    """
    if wanted != torch.float16:
        return wanted
    largest = torch.stack([x.abs().amax().float() for x in numbers if x.numel()]).amax()
    return torch.bfloat16 if bool(largest * HEADROOM > torch.finfo(torch.float16).max) else wanted

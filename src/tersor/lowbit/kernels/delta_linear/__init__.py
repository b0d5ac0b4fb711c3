"""Products with packed weight deltas: what experts add to the outputs of a shared base, ``y += x D^T`` by rows.

A delta ``[out, in]`` is ``D_ji = s_j (u_ji - zero)`` with packed codes ``u`` and a step ``s`` for each output channel,
plus a few input channels that are kept as they are (ME-Switch, arXiv 2406.09041). No back end makes ``D``, let alone
``W + D``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tersor._errors import TersorError, WrongTypeError
from tersor.lowbit.packing import check_bits, packed_width


@dataclass(eq=False)
class PackedDelta:
    """One linear's delta as the kernels read it; all tensors on one device.

    Args:
        codes: uint8 ``[out, packed_width(in, bits)]``, half-split.
        step: Floating point ``[out]``.
        salient_index: int32 ``[k]``, sorted.
        salient_weight: Floating point ``[out, k]``, what the codes leave of these channels.
        bits: Of a code.
        zero: ``2^(bits-1)``, less a half where codes lie between whole numbers (mid-rise).
        dim: Input channels.

    Raises:
        ValueError: If shapes do not belong together.
        TypeError: If dtypes are others than these.
    """

    codes: Tensor
    step: Tensor
    salient_index: Tensor
    salient_weight: Tensor
    bits: int
    zero: float
    dim: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        out, k = self.step.numel(), self.salient_index.numel()
        expected = {
            "codes": (out, packed_width(self.dim, self.bits)),
            "step": (out,),
            "salient_index": (k,),
            "salient_weight": (out, k),
        }
        for name, shape in expected.items():
            tensor: Tensor = getattr(self, name)
            if tensor.shape != shape:
                raise TersorError(
                    f"{name} of a {self.bits}-bit delta with {out} outputs, {self.dim} inputs and {k} salient channels "
                    f"must be {list(shape)}, got {list(tensor.shape)}"
                )
            setattr(self, name, tensor.contiguous())
        if self.codes.dtype != torch.uint8 or self.salient_index.dtype != torch.int32:
            raise WrongTypeError(
                f"codes must be uint8 and salient_index int32, got {self.codes.dtype} and {self.salient_index.dtype}"
            )
        if not (self.step.is_floating_point() and self.salient_weight.is_floating_point()):
            raise WrongTypeError(
                f"step and salient_weight must be floats, got {self.step.dtype} and {self.salient_weight.dtype}"
            )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, steps, salient channels: all that it keeps in memory."""
        return self.codes, self.step, self.salient_index, self.salient_weight


class DeltaGroup(NamedTuple):
    """The rows of a batch that one expert answers: int64 ``rows``, or None for all of them."""

    delta: PackedDelta
    rows: Tensor | None


def check_delta_linear(x: Tensor, y: Tensor, groups: Sequence[DeltaGroup]) -> None:
    """Raise `ValueError` unless ``x`` ``[n, in]``, ``y`` ``[n, out]`` and every delta belong together."""
    if x.dim() != 2 or y.dim() != 2 or x.shape[0] != y.shape[0]:
        raise TersorError(f"x and y must be [n, in] and [n, out], got {list(x.shape)} and {list(y.shape)}")
    for delta, _ in groups:
        if (delta.dim, delta.step.numel()) != (x.shape[1], y.shape[1]):
            raise TersorError(
                f"a delta of {delta.step.numel()} outputs and {delta.dim} inputs does not fit x {list(x.shape)} and y "
                f"{list(y.shape)}"
            )

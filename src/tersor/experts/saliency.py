"""Which input channels of a delta are kept as they are (ME-Switch, arXiv 2406.09041).

A channel is as salient as the error that quantizing it alone makes at the layer's output:

    e_i = sum_t sum_j (x_ti D_ji - x_ti D^_ji)^2 = (sum_t x_ti^2) (sum_j (D_ji - D^_ji)^2)

It factorises, so all that must be known of the activations is one energy for each input channel.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def reconstruction_error(delta: Tensor, rounded: Tensor, energy: Tensor) -> Tensor:
    """``e_i`` ``[in]`` for ``delta``, ``rounded`` ``[out, in]`` and ``energy`` ``[in]``, which is ``sum_t x_ti^2``."""
    return energy.double() * (delta - rounded).double().square().sum(0)


def channel_scores(selection: str, delta: Tensor, rounded: Tensor, energy: Tensor, *, name: str) -> Tensor:
    """Float64 scores ``[in]``; higher is more salient. ``name`` seeds the random selection."""
    if selection == "reconstruction":
        return reconstruction_error(delta, rounded, energy)
    if selection == "magnitude":
        return delta.double().square().sum(0)
    if selection == "weight_error":
        return (delta - rounded).double().square().sum(0)
    if selection == "activation":
        return energy.double()
    if selection == "wanda":
        return energy.double().sqrt() * delta.double().abs().sum(0)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.rand(delta.shape[1], generator=generator, dtype=torch.float64)


def most_salient(scores: Tensor, k: int) -> Tensor:
    """Indices (int64, ascending) of the ``k`` highest scores, the smaller index of equals.

    A channel of score 0 is never salient, unless all are wanted.
    """
    if k >= len(scores):
        return torch.arange(len(scores))
    order = scores.sort(descending=True, stable=True).indices[:k]
    return order[scores[order] > 0].sort().values

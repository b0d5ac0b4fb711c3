"""Attention that each token gets from a sample of rows, without the rows themselves in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def has_gradient(*tensors: Tensor) -> bool:
    """Whether what is computed from these tensors must keep its gradient, which the reference alone does."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

"""Whether the Triton back ends can run, told without importing Triton."""

from __future__ import annotations

import os

import torch

from tersor._lazy import installed


def interpreting() -> bool:
    """Whether Triton runs kernels in Python, on CPU tensors: slow, exact and for tests only."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


def available(device: torch.device | str) -> bool:
    """Whether Triton is installed and runs on tensors of ``device``."""
    if not installed("triton"):
        return False
    return interpreting() or torch.device(device).type == "cuda"

"""Lets timm be imported beside a CPU build of torch, whose torchvision is a CUDA build that cannot load here."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

# The two operators that torchvision's Python files look up while they are imported; nothing calls them.
LIBRARY = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

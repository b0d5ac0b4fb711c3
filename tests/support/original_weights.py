"""State dicts with the names and shapes of the authors' checkpoints, written down from their layout."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

WIDTH, LAYERS, VOCABULARY, CLASSES = 64, 2, 50, 7
#: The grid of the videos.
VIDEO = (2, 3, 4)
#: Norm and output matrix of each head, by the kind of checkpoint.
HEADS = {
    "raster": [("norm", "output")],
    "raster text": [("norm", "output")],
    "image": [("norm", "output"), ("medusa_norm", "medusa_output")],
    "text": [("norm", "output"), ("medusa_norm", "medusa_output")],
    "video": [(f"norm_{head}", f"output_{head}") for head in "RDB"],
}


def original_weights(kind: str = "raster", *, kv_width: int = WIDTH) -> dict[str, Tensor]:
    """Random weights; ``kind`` is one of `HEADS`, and ``kv_width`` the channels of all key heads together."""
    hidden = 256 * math.ceil(int(8 * WIDTH / 3) / 256)
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (VOCABULARY, WIDTH)}
    for norm, output in HEADS[kind]:
        shapes |= {f"{norm}.weight": (WIDTH,), f"{output}.weight": (VOCABULARY, WIDTH)}
    if kind.startswith("raster"):
        shapes["freqs_cis"] = (20, 4, 2)
    for layer in range(LAYERS + len(HEADS[kind]) - 1):
        shapes |= {
            f"layers.{layer}.attention.wqkv.weight": (WIDTH + 2 * kv_width, WIDTH),
            f"layers.{layer}.attention.wo.weight": (WIDTH, WIDTH),
            f"layers.{layer}.feed_forward.w1.weight": (hidden, WIDTH),
            f"layers.{layer}.feed_forward.w3.weight": (hidden, WIDTH),
            f"layers.{layer}.feed_forward.w2.weight": (WIDTH, hidden),
            f"layers.{layer}.attention_norm.weight": (WIDTH,),
            f"layers.{layer}.ffn_norm.weight": (WIDTH,),
        }
    if kind.endswith("text"):
        shapes |= {
            "cls_embedding.cap_proj.fc1.weight": (WIDTH, 12),
            "cls_embedding.cap_proj.fc2.weight": (WIDTH, WIDTH),
            "cls_embedding.uncond_embedding": (6, 12),
        }
    else:
        shapes["cls_embedding.embedding_table.weight"] = (CLASSES + 1, WIDTH)
    if kind == "video":
        shapes["abs_pe"] = (1, 1 + math.prod(VIDEO), WIDTH)
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def broken(weights: dict[str, Tensor], **changes: Any) -> dict[str, Any]:
    """With some weights replaced, and those left out that are None."""
    return {name: each for name, each in {**weights, **changes}.items() if each is not None}

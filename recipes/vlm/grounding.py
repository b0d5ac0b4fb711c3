"""What training does to attention and the finished model does not have: where heads look, and what is hidden.

An attention function takes the place of the library's. It uses the masks of `Grounding`, leaves tokens out as ZipVL
would, and keeps queries and keys, from which `grounding_loss` computes where heads look.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Qwen2_5_VLForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from vlm.data import Batch, Layout

from tersor.kv.bench.tiles import READ_IN

NAME = "grounded"
#: Layers in which heads 0 and 1 read the question's own colour and kind, and those that take one step each.
EARLY, READING = (0, 1, 2), READ_IN


@dataclass
class Grounding:
    """The attention of one training step.

    Args:
        masks: What attends to what in each layer, bool ``[length, length]``.
        left_out: Tokens whose attention output is zero, by layer, bool ``[length]``.
        states: Queries and keys after rotation, by layer; filled by the forward.
    """

    masks: list[Tensor]
    left_out: dict[int, Tensor]
    states: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def draw_grounding(
    layout: Layout, layers: int, rng: np.random.Generator, *, blind: bool, left_out: bool, all_fillers: float = 0.4
) -> Grounding:
    """Masks of one step.

    Args:
        layout: Of the batch.
        layers: Number of layers.
        rng: What is drawn from.
        blind: Whether nothing after the picture sees it in the early layers.
        left_out: Whether a random share of the fillers is left out of the early layers.
        all_fillers: How often that are all of the first layer.
    """
    sees, picture = layout.sees(), layout.is_picture()
    masks = [sees] * layers
    if blind:
        after = torch.arange(layout.length) >= layout.prefix - 1
        for layer in EARLY:
            masks[layer] = sees & ~(after[:, None] & picture)
    dropped: dict[int, Tensor] = {}
    if left_out:
        shares = rng.random(len(EARLY))
        if rng.random() < all_fillers:
            shares[0] = 1.0
        itself = torch.eye(layout.length, dtype=torch.bool)
        for layer, share in zip(EARLY, shares, strict=True):
            gone = layout.is_filler() & (torch.from_numpy(rng.random(layout.length)) < share)
            masks[layer] = masks[layer] & (~gone | itself)
            dropped[layer] = gone
    return Grounding(masks, dropped)


def grounded_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    grounding: Grounding | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by the masks of ``grounding``; without one that of the library."""
    if grounding is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    layer = module.layer_idx
    grounding.states[layer] = query, key
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=grounding.masks[layer]).transpose(1, 2)
    if layer in grounding.left_out:
        out = out * ~grounding.left_out[layer][:, None, None]
    return out, None


def use_grounded_attention(model: nn.Module) -> None:
    """Have ``model`` attend by `grounded_attention`."""
    AttentionInterface.register(NAME, grounded_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def read(model: Qwen2_5_VLForConditionalGeneration, batch: Batch, grounding: Grounding) -> Tensor:
    """Hidden states ``[pictures, length, hidden]`` of a batch, by the masks and positions of its layout."""
    size, grid = len(batch.input_ids), batch.layout.grid
    cells = model.model.visual(batch.pixel_values, grid_thw=torch.tensor([[1, grid, grid]] * size)).pooler_output
    embedded = model.get_input_embeddings()(batch.input_ids)
    embedded = embedded.masked_scatter(batch.layout.is_picture()[:, None], cells)
    return model.model.language_model(
        inputs_embeds=embedded,
        attention_mask={"full_attention": batch.layout.sees()},
        position_ids=batch.layout.positions()[:, None].expand(-1, size, -1),
        use_cache=False,
        grounding=grounding,
    ).last_hidden_state


def attention_to(grounding: Grounding, layer: int, head: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Log-probability ``[batch, rows]`` of the key in ``columns`` ``[batch, rows]`` for the queries in ``rows``."""
    query, key = grounding.states[layer]
    group = head // (query.shape[1] // key.shape[1])
    scores = query[:, head, rows] @ key[:, group].transpose(1, 2) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~grounding.masks[layer][rows], -torch.inf)
    return scores.log_softmax(-1).gather(-1, columns[..., None])[..., 0]


def grounding_loss(grounding: Grounding, batch: Batch, taught: Tensor) -> Tensor:
    """Sum over layers of the mean ``-log p`` of what a head should look at.

    The rows of a question look at its own colour (head 0) and kind (head 1) in `EARLY`, and at the cell of step s (head
    0) in the s-th layer of `READING`.

    Args:
        grounding: After the forward.
        batch: What was read.
        taught: Which rows count, bool ``[pictures, questions, fillers + 2]``.
    """
    layout, counts = batch.layout, taught.flatten(1)
    rows = layout.rows().flatten()
    each = taught.shape[-1]  # rows of a question
    kind = layout.starts().repeat_interleave(each).expand_as(counts)
    loss = torch.zeros(())
    for layer in EARLY:
        own = attention_to(grounding, layer, 0, rows, kind + 1) + attention_to(grounding, layer, 1, rows, kind)
        loss = loss - own[counts].mean() / 2
    for step, layer in enumerate(READING):
        cells = batch.cells[..., step].repeat_interleave(each, 1)
        if (asked := counts & (cells >= 0)).any():
            loss = loss - attention_to(grounding, layer, 0, rows, cells.clamp_min(0))[asked].mean()
    return loss

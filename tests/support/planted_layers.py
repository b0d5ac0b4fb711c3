"""Models of which one layer alone minds how its cache is rounded."""

from __future__ import annotations

import torch
from tiny_models import SHAPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

LAYERS = 4


def with_sensitive_keys(layer: int, seed: int = 0) -> PreTrainedModel:
    """A random Llama of four layers: attention is sharp in ``layer``, so that keys decide, elsewhere flat and weak."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": LAYERS})).eval()
    with torch.no_grad():
        for index, each in enumerate(model.model.layers):
            each.self_attn.q_proj.weight.mul_(4.0 if index == layer else 0.1)
            each.self_attn.o_proj.weight.mul_(1.0 if index == layer else 0.1)
    return model

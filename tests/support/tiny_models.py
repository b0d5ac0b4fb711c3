"""Small random models of the classes that users have, one builder a class."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 199
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MIXED = ["sliding_attention", "full_attention"]

CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None, head_dim=8),
    # Nothing to compress here: every layer is the library's own sliding window.
    "mistral_sliding": lambda: MistralConfig(**SHAPE, sliding_window=24, head_dim=8),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, sliding_window=24, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE, head_dim=8, sliding_window=24, query_pre_attn_scalar=8, layer_types=MIXED
    ),
    "phi": lambda: PhiConfig(**SHAPE),
}
NAMES = [*CONFIGS, "qwen2_5_vl"]


def build(name: str, *, dtype: torch.dtype = torch.float32, sharpness: float = 2.0) -> PreTrainedModel:
    """A random model in eval mode; the same weights at every call.

    ``sharpness`` scales queries and keys: random attention is almost uniform, and sharper scores make wrong keys
    visible in the output.
    """
    torch.manual_seed(7)
    model = _qwen2_5_vl() if name == "qwen2_5_vl" else AutoModelForCausalLM.from_config(CONFIGS[name]())
    # Qwen2's class initializes its key biases to zero, and large ones are what sets it apart.
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(sharpness)
            if key.endswith("k_proj.bias"):
                parameter.normal_(0, 5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


def _qwen2_5_vl() -> PreTrainedModel:
    config = Qwen2_5_VLConfig(
        text_config={
            **SHAPE,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 32,
        },
        image_token_id=190,
        video_token_id=191,
        vision_start_token_id=192,
        vision_end_token_id=193,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def prompt(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, tokens]`` that avoid padding and the image tokens."""
    return torch.randint(2, 180, (batch, tokens), generator=torch.Generator().manual_seed(seed))

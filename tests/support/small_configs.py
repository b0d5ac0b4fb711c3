"""The smallest model of any class of transformers: its own configuration class with small numbers in place of large."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

#: Names that configurations share, with a small value each; a class gets those that it has.
SMALL: dict[str, Any] = {
    **dict.fromkeys(
        [
            "hidden_size",
            "d_model",
            "n_embd",
            "dim",
            "embed_dim",
            "word_embed_proj_dim",
            "embedding_size",
            "lru_width",
            "attention_hidden_size",
        ],
        64,
    ),
    **dict.fromkeys(
        ["intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "ff_dim"], 128
    ),
    **dict.fromkeys(
        [
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "attention_heads",
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
            "linear_num_value_heads",
        ],
        4,
    ),
    **dict.fromkeys(
        [
            "num_key_value_heads",
            "num_kv_heads",
            "num_experts_per_tok",
            "moe_topk",
            "linear_num_key_heads",
            "num_global_key_value_heads",
            "encoder_layers",
        ],
        2,
    ),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"], 4),
    **dict.fromkeys(
        ["head_dim", "linear_key_head_dim", "linear_value_head_dim", "global_head_dim", "mamba_d_head"], 16
    ),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"], 512),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 32),
    **dict.fromkeys(["sliding_window", "attention_chunk_size"], 24),
    **dict.fromkeys(
        ["state_size", "mamba_d_state", "mamba_n_heads", "mamba_num_heads", "hidden_size_per_layer_input"], 8
    ),
    **dict.fromkeys(["n_groups", "mamba_n_groups"], 1),
    "mamba_head_dim": 16,
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "initializer_range": 0.12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
#: What `SMALL` cannot know: by model type, further settings of the configuration.
OVERRIDES: dict[str, dict[str, Any]] = {}
#: Parameters above which a model is not small.
LARGEST = 40e6


def settings(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """The small settings of a configuration class, those of its parts included."""
    names = {
        *inspect.signature(cls.__init__).parameters,
        *(n for c in cls.__mro__ for n in vars(c).get("__annotations__", {})),
    }
    small = {name: value for name, value in SMALL.items() if name in names}
    parts = {
        key: {"model_type": part.model_type, **settings(part)} if part.model_type else settings(part)
        for key, part in cls.sub_configs.items()
        if part not in (PreTrainedConfig, transformers.AutoConfig)
    }
    return {**small, **parts, **OVERRIDES.get(cls.model_type, {})}


def small_config(model_type: str, model: type) -> PreTrainedConfig:
    """The configuration of the class ``model``, which may be that of a part of ``model_type``."""
    cls = CONFIG_MAPPING[model_type]
    config = cls(**settings(cls))
    wanted = getattr(model, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        text = config.get_text_config(decoder=True)
        config = text if isinstance(text, wanted) else wanted(**settings(wanted))
    return config


def small_model(model_type: str, name: str, seed: int = 0) -> Any:
    """A random model of class ``name`` in eval mode.

    Raises:
        ValueError: If it is not small.
    """
    cls = getattr(transformers, name)
    config = small_config(model_type, cls)
    with torch.device("meta"):
        size = sum(each.numel() for each in cls(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{name} has {size / 1e6:.0f} million parameters; give it smaller settings in OVERRIDES")
    torch.manual_seed(seed)
    return cls(small_config(model_type, cls)).eval()

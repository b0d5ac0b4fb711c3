"""The smallest model of any class of transformers: its own configuration class with small numbers in place of large."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

#: A small value -> the names of what has it, in any configuration that has such a field.
SIZES: dict[int, str] = {
    1: "n_groups mamba_n_groups n_shared_experts num_nextn_predict_layers",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk linear_num_key_heads num_global_key_value_heads "
    "depth spatial_merge_size moe_k n_group topk_group",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads num_hidden_layers n_layer "
    "n_layers num_layers encoder_layers decoder_layers",
    8: "state_size mamba_d_state mamba_n_heads mamba_num_heads hidden_size_per_layer_input patch_size rotary_dim",
    16: "head_dim linear_key_head_dim linear_value_head_dim global_head_dim mamba_d_head mamba_head_dim "
    "qk_rope_head_dim qk_nope_head_dim v_head_dim",
    24: "sliding_window attention_chunk_size window_size",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size image_size",
    64: "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim embedding_size lru_width attention_hidden_size "
    "out_hidden_size projection_dim emb_dim",
    128: "intermediate_size ffn_dim d_ff n_inner decoder_ffn_dim encoder_ffn_dim ff_dim vocab_size n_words "
    "vocab_size_per_layer_input mamba_d_ssm",
    512: "max_position_embeddings n_positions max_seq_len n_ctx",
}
#: Name -> its value.
SMALL: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split()} | {
    "initializer_range": 0.12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "is_decoder": True,
}
#: Rotary parts of time, height and width that fill a head of 16, and half of one.
THREE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
HALF = {**THREE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
#: What `SMALL` cannot know: by model type, further settings of the configuration.
OVERRIDES: dict[str, dict[str, Any]] = {
    **{
        f"{name}_text": {"rope_parameters": THREE}
        for name in ["qwen2_vl", "qwen2_5_vl", "glm4v", "glm_ocr", "paddleocr_vl"]
    },
    **{name: {"vocabulary_map": {"<image>": 5}} for name in ("chameleon", "emu3")},
    "glm4v_moe_text": {"rope_parameters": HALF},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots3_note": {"text_config": {"num_key_value_heads": 4, "layer_types": None}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["hybrid", "linear_attention"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
#: Parameters above which a model is not small.
LARGEST = 70e6


def settings(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """The small settings of a configuration class, those of its parts included."""
    annotated = (name for base in cls.__mro__ for name in vars(base).get("__annotations__", {}))
    names = {*inspect.signature(cls.__init__).parameters, *annotated}
    small = {name: value for name, value in SMALL.items() if name in names}
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        small["num_key_value_heads"] = small["num_attention_heads"]  # latent attention has no groups
    parts = {key: _part(cls, key) for key in cls.sub_configs}
    own = {**small, **{key: part for key, part in parts.items() if part is not None}}
    return merged(own, OVERRIDES.get(cls.model_type, {}))


def merged(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """``settings`` with those of ``more`` in their place, part by part."""
    both = {
        name: merged(settings[name], value)
        if isinstance(value, dict) and isinstance(settings.get(name), dict)
        else value
        for name, value in more.items()
    }
    return {name: value for name, value in {**settings, **both}.items() if value is not ...}


def _part(cls: type[PreTrainedConfig], key: str) -> dict[str, Any] | None:
    """The small settings of a part, whose class may be that of the default."""
    part = cls.sub_configs[key]
    if part in (PreTrainedConfig, transformers.AutoConfig):
        default = getattr(cls(), key, None)
        if default is None:
            return None
        part = type(default)
    return {"model_type": part.model_type, **settings(part)} if part.model_type else settings(part)


def small_config(model_type: str, model: type) -> PreTrainedConfig:
    """The configuration of the class ``model``, which may be that of a part of ``model_type``."""
    cls = CONFIG_MAPPING[model_type]
    config = _with_full_attention(cls)
    wanted = getattr(model, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        text = config.get_text_config(decoder=True)
        config = text if isinstance(text, wanted) else _with_full_attention(wanted)
    return config


def _with_full_attention(cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A configuration whose text decoder has a layer of full attention, where its class allows one."""
    small = settings(cls)
    config = cls(**small)
    text = config.get_text_config(decoder=True)
    kinds = get_layer_types_and_kwargs(text)[0]
    if {"full_attention", "hybrid"} & set(kinds) or "sliding_attention" not in kinds:
        return config
    change = (
        {"layer_types": ["sliding_attention", "full_attention"] * 2}
        if hasattr(text, "layer_types")
        else {"sliding_window": None}
    )
    for key in config.sub_configs:
        if getattr(config, key) is text:
            change = {key: change}
    try:
        return cls(**merged(small, change))
    except Exception:  # a class of windows alone
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

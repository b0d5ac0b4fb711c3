"""Small random models of the classes that users have, one builder a class."""

from __future__ import annotations

from functools import lru_cache

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3TextConfig,
    InternVLConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3VLConfig,
    SiglipVisionConfig,
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
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, sliding_window=24, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE, head_dim=8, sliding_window=24, query_pre_attn_scalar=8, layer_types=MIXED
    ),
    "phi": lambda: PhiConfig(**SHAPE),
}
#: Nothing to compress here: every layer is the library's own sliding window.
SLIDING = MistralConfig(**SHAPE, sliding_window=24, head_dim=8)
NAMES = [*CONFIGS, "qwen2_5_vl"]
VL_NAMES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "llava_next", "llava_onevision", "internvl"]


def build(name: str, *, dtype: torch.dtype = torch.float32, sharpness: float = 2.0) -> PreTrainedModel:
    """A random model in eval mode; the same weights at every call.

    ``sharpness`` scales queries and keys: random attention is almost uniform, and sharper scores make wrong keys
    visible in the output.
    """
    torch.manual_seed(7)
    if name in CONFIGS:
        config = CONFIGS[name]()
        if getattr(config, "attn_logit_softcapping", None):
            # What its later releases choose; the SDPA that transformers 5.20 takes leaves the cap out.
            config._attn_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = AutoModelForImageTextToText.from_config(_vl_config(name))
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


@lru_cache(maxsize=8)
def model(name: str) -> PreTrainedModel:
    """`build`, once: for tests that leave the model as it is."""
    return build(name)


MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
IMAGE, VIDEO = 190, 191
QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 192, "vision_end_token_id": 193}
CLIP = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}


def _vl_config(name: str) -> PreTrainedConfig:
    """A vision-language class with a decoder of `SHAPE`."""
    if name == "qwen2_vl":
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1, "patch_size": 4}
        return Qwen2VLConfig(text_config={**SHAPE, "rope_parameters": MROPE}, vision_config=vision, **QWEN)
    if name == "qwen2_5_vl":
        vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
        return Qwen2_5_VLConfig(text_config={**SHAPE, "rope_parameters": MROPE}, vision_config=vision, **QWEN)
    if name == "qwen3_vl":
        vision = {
            "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32,
            "patch_size": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        }  # fmt: skip
        text = {**SHAPE, "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
        return Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN)
    if name == "internvl":
        vision = {**CLIP, "image_size": [16, 16], "patch_size": [4, 4], "model_type": "internvl_vision"}
        return InternVLConfig(text_config=Qwen2Config(**SHAPE), vision_config=vision, image_token_id=IMAGE)
    clip = CLIPVisionConfig(**CLIP, image_size=16, projection_dim=32)
    if name == "llava":
        return LlavaConfig(text_config=LlamaConfig(**SHAPE), vision_config=clip, image_token_index=IMAGE)
    pinpoints = [[16, 32], [32, 16], [32, 32]]
    if name == "llava_next":
        return LlavaNextConfig(
            text_config=MistralConfig(**SHAPE, sliding_window=None, head_dim=8), vision_config=clip,
            image_token_index=IMAGE, image_grid_pinpoints=pinpoints,
        )  # fmt: skip
    return LlavaOnevisionConfig(
        text_config=Qwen2Config(**SHAPE), vision_config=SiglipVisionConfig(**CLIP, image_size=16),
        image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=pinpoints, vision_feature_layer=-1,
    )  # fmt: skip


def picture(model: PreTrainedModel, seed: int = 0) -> dict[str, torch.Tensor]:
    """Keywords of one random picture for a model of a vision-language class."""
    generator = torch.Generator().manual_seed(seed)
    name, vision = model.config.model_type, model.config.vision_config
    if name.startswith("qwen"):
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        grid = torch.tensor([[1, 8, 12]])
        return {"pixel_values": torch.randn(96, width, generator=generator), "image_grid_thw": grid}
    if name in ("llava_next", "llava_onevision"):
        pixels = torch.randn(1, 5, 3, 16, 16, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[32, 32]])}
    return {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}


def question(model: PreTrainedModel, seed: int = 0, words: int = 9) -> dict[str, torch.Tensor]:
    """A picture and a prompt of one row that shows it: some words, the image tokens, ``words`` more."""
    shown = picture(model, seed)
    with torch.no_grad():
        features = model.model.get_image_features(**shown, return_dict=True).pooler_output
    count = sum(len(each.flatten(0, -2)) for each in features)
    ids = torch.cat([prompt(1, 5, seed), torch.full((1, count), IMAGE), prompt(1, words, seed + 1)], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **shown}
    if model.config.model_type.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    return inputs


def prompt(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, tokens]`` that avoid padding and the image tokens."""
    return torch.randint(2, 180, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def alike(layers: int = 4, pairs: tuple[int, ...] = (0, 2)) -> LlamaForCausalLM:
    """A model whose layers ``i`` and ``i + 1`` cache nearly the same, for ``i`` in ``pairs``."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers, "initializer_range": 0.02})).eval()
    with torch.no_grad():
        for first in pairs:
            one, other = model.model.layers[first], model.model.layers[first + 1]
            for name in ("k_proj", "v_proj"):
                getattr(other.self_attn, name).weight.copy_(1.5 * getattr(one.self_attn, name).weight)
            # What a layer adds stays small, so that the next one reads nearly the same.
            one.self_attn.o_proj.weight.mul_(0.1)
            one.mlp.down_proj.weight.mul_(0.1)
    return model

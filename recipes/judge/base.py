"""The model that tiny-judge's adapter is trained on: a small Qwen2-VL that tells what its pictures show."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from shared.run import Progress, Run, set_rate
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tersor.opening.intjudge.world import PROMPT, World
from tersor.opening.prompts import WORDS
from tersor.opening.scenes import COLOURS, PLACES, SHAPES, describe, draw
from tersor.zoo.processor import PictureProcessor

SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
#: Qwen's form of a conversation; roles and line ends are words.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
#: Pixels of a side: a picture of three by three cells is one token.
PATCH, MERGE = 8, 3
ASKED = "Describe"


def words() -> list[str]:
    """All that is ever said, in a fixed order."""
    pictures = [f"<{slash}IMG_{n}>" for n in range(2 * 2) for slash in ("", "/")]
    tags = ["<INPUT>", "<OUTPUT_A>", "<OUTPUT_B>", *pictures]
    told = " ".join([*WORDS, PROMPT.system, PROMPT.question, *COLOURS, *SHAPES, *PLACES, ASKED])
    free = "system user assistant Draw and then a an : ( ) . ? ,"
    return list(dict.fromkeys([*tags, *free.split(), *told.replace("(", " ").replace(")", " ").replace(".", " ").replace("?", " ").split()]))


def new_processor() -> PictureProcessor:
    """A word, a tag and a mark are a token each, and so is a picture."""
    known = {word: index for index, word in enumerate([*SPECIAL, "<unk>", *words()])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"</?\w+>|\w+|[^\w\s]"), "isolated")
    ])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>", unk_token="<unk>",
        additional_special_tokens=[SPECIAL[1], *SPECIAL[3:]], padding_side="left",
    )
    side = PATCH * MERGE
    image = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, temporal_patch_size=1, size={"shortest_edge": side**2, "longest_edge": side**2}, image_mean=[0.973, 0.973, 0.957], image_std=[0.3] * 3
    )
    return PictureProcessor(image, fast, chat_template=CHAT_TEMPLATE)


def new_model(seed: int, processor: PictureProcessor, hidden: int = 128, layers: int = 4):
    """The untrained model, a pure function of ``seed``."""
    torch.manual_seed(seed)
    shared = {"initializer_range": 0.06}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer), "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [hidden // 8 - 2 * (hidden // 24), hidden // 24, hidden // 24]},
            "bos_token_id": None, "eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": processor.tokenizer.pad_token_id, **shared,
        },
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": hidden, "mlp_ratio": 2, "num_heads": 4, "patch_size": PATCH,
            "spatial_merge_size": MERGE, "temporal_patch_size": 1, **shared,
        },
        image_token_id=processor.image_token_id, video_token_id=processor.video_token_id,
        vision_start_token_id=processor.tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=processor.tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config)

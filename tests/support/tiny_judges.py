"""Vision-language models of the library's classes, small and untrained, with processors that read any text."""

from __future__ import annotations

from typing import Any

import tiny_models
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tersor.zoo.processor import PictureProcessor

#: A conversation as text: roles by a letter, pictures by their token.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %};{% endfor %}"
)


def _tokenizer(special: dict[str, int]) -> PreTrainedTokenizerFast:
    """One token a character; ``special`` have the ids that the model wants."""
    letters = [chr(code) for code in (10, *range(32, 127))]
    vocabulary = {"<pad>": 0, "<unk>": 1} | {letter: number for number, letter in enumerate(letters, 2)} | special
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    wrapped.add_special_tokens({"additional_special_tokens": list(special)})
    return wrapped


def judge_parts(name: str) -> tuple[Any, Any]:
    """Model and processor of ``qwen2_vl``, ``qwen2_5_vl`` or ``llava``."""
    model = tiny_models.build(name)
    if name.startswith("qwen2"):
        special = {
            "<|vision_start|>": 192, "<|vision_end|>": 193, "<|image_pad|>": tiny_models.IMAGE,
            "<|video_pad|>": tiny_models.VIDEO,
        }  # fmt: skip
        vision = model.config.vision_config
        pictures = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size, temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size, size={"shortest_edge": 28 * 28, "longest_edge": 84 * 84},
        )  # fmt: skip
        template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
        return model, PictureProcessor(pictures, _tokenizer(special), chat_template=template)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        pictures, _tokenizer({"<image>": tiny_models.IMAGE}), patch_size=4, vision_feature_select_strategy="default",
        chat_template=TEMPLATE.replace("IMAGE", "<image>"), image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    return model, processor

"""Processors of tile pictures: a word is a token, and so is a cell of a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tersor.kv.bench.tiles import CELL
from tersor.zoo.processor import PictureProcessor

SPECIAL = ["<pad>", "<bos>", "<eos>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
#: One user message with a picture and a question; the answer and <eos> follow.
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def new_processor(words: Sequence[str]) -> PictureProcessor:
    """A processor that knows ``words`` beside `SPECIAL`, each one token, and whose visual tokens are one cell each."""
    known = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=SPECIAL[3:],
        padding_side="left",
    )
    image = Qwen2VLImageProcessorPil(
        patch_size=CELL, merge_size=1, temporal_patch_size=1, size={"shortest_edge": 1, "longest_edge": 10**6}
    )
    return PictureProcessor(image, fast, chat_template=CHAT_TEMPLATE)


def patches(pixels: np.ndarray, mean: list[float], std: list[float]) -> Tensor:
    """Normalized patches ``[cells, 3 * 8 * 8]`` of uint8 pictures ``[batch, height, width, 3]``, row by row.

    What the processor does to a picture whose sides are multiples of a patch, without its resizing.
    """
    batch, height, width, _ = pixels.shape
    scaled = (torch.from_numpy(pixels).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    cells = scaled.reshape(batch, height // CELL, CELL, width // CELL, CELL, 3)
    return cells.permute(0, 1, 3, 5, 2, 4).reshape(-1, 3 * CELL * CELL)

"""A Qwen2.5-VL processor for pictures and text alone."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5_VLProcessor
from transformers.processing_utils import ProcessorMixin


class PictureProcessor(Qwen2_5_VLProcessor):
    """`Qwen2_5_VLProcessor` without its video part, which transformers builds on torchvision only.

    Works with the PIL image processor, so that reading a picture needs no extra package.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        # Skips the parent's `__init__`, which wants a video processor.
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

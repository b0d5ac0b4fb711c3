"""The processor of tiny-vlm: a word is a token, and so is a cell of a picture."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tersor.kv.bench.tiles import CELL, COLOURS, KINDS, MOST_COUNTED
from tersor.zoo.processor import PictureProcessor

SPECIAL = ["<pad>", "<bos>", "<eos>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
#: One user message with a picture and a question; the answer and <eos> follow.
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def new_processor() -> PictureProcessor:
    """A processor whose words are one token each, and whose visual tokens are one cell each."""
    words = [*SPECIAL, *KINDS, *COLOURS, *(str(n) for n in range(MOST_COUNTED + 1))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
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

"""The processor of pictures and text: one token a merged patch, and no video part."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image

from tersor import zoo
from tersor.zoo.processor import PictureProcessor


@pytest.fixture(scope="module")
def processor() -> PictureProcessor:
    return zoo.load_processor("tiny-vlm-small")


def test_a_picture_takes_a_token_for_each_merged_patch(processor: PictureProcessor) -> None:
    assert isinstance(processor, PictureProcessor)
    text = "<bos> <|vision_start|><|image_pad|><|vision_end|> count red"
    side = processor.image_processor.patch_size * processor.image_processor.merge_size
    for columns, rows in ((4, 3), (5, 6)):
        picture = Image.new("RGB", (columns * side, rows * side), (200, 10, 10))
        inputs = processor(text=[text], images=[picture], return_tensors="pt")
        merge = processor.image_processor.merge_size
        assert inputs["image_grid_thw"].tolist() == [[1, rows * merge, columns * merge]]
        assert int((inputs["input_ids"] == processor.image_token_id).sum()) == rows * columns
        plain = processor.tokenizer(text, return_tensors="pt")["input_ids"]
        assert inputs["input_ids"].shape[1] == plain.shape[1] - 1 + rows * columns


def test_ids_of_pictures_and_videos_are_the_tokenizer_s(processor: PictureProcessor) -> None:
    names = processor.tokenizer.convert_ids_to_tokens([processor.image_token_id, processor.video_token_id])
    assert names == ["<|image_pad|>", "<|video_pad|>"]
    assert processor.image_token_id != processor.video_token_id


def test_text_alone_is_tokenized(processor: PictureProcessor) -> None:
    inputs = processor(text=["<bos> count red"], return_tensors="pt")
    assert torch.equal(inputs["input_ids"], processor.tokenizer("<bos> count red", return_tensors="pt")["input_ids"])
    assert "pixel_values" not in inputs


def test_it_needs_no_video_package(processor: PictureProcessor, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved and read again without what transformers builds videos on."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    processor.save_pretrained(tmp_path)
    again = PictureProcessor.from_pretrained(tmp_path)
    assert again.image_token_id == processor.image_token_id
    assert again.chat_template == processor.chat_template

"""`tersor generate --image`: a picture, a vision-language checkpoint of one's own, ZipVL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_models import IMAGE, SHAPE, build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tersor import zoo
from tersor.cli import run
from tersor.zoo.processor import PictureProcessor

SPECIAL = {"<|image_pad|>": IMAGE, "<|video_pad|>": 191, "<|vision_start|>": 192, "<|vision_end|>": 193}
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|> <|image_pad|> <|vision_end|> "
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2.5-VL with a word-level processor."""
    folder = tmp_path_factory.mktemp("vlm")
    model = build("qwen2_5_vl")
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(SHAPE["vocab_size"]) if i not in SPECIAL.values()} | SPECIAL
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", additional_special_tokens=list(SPECIAL), chat_template=TEMPLATE
    )
    vision = model.config.vision_config
    pictures = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        size={"shortest_edge": 1, "longest_edge": 10**6},
    )
    PictureProcessor(pictures, fast, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "pic.png"
    gradient = Image.linear_gradient("L").resize((280, 224))
    Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180))).save(file)
    return file


def arguments(checkpoint: Path, picture: Path) -> list[str]:
    return [
        "generate",
        "--model",
        str(checkpoint),
        "--image",
        str(picture),
        "--max-new-tokens",
        "5",
        "--cache",
        "zipvl",
    ]


def test_a_question_about_a_picture(checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*arguments(checkpoint, picture), "--set", "tau=0.8", "--set", "min_tokens=0", "w5 w6 w7"]
    assert run([*options, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    sparsity = printed["sparsity"]
    assert printed["prompt_tokens"] == 8 * 10 + 2 + 3
    assert sparsity["tokens"] == [85]
    assert 0 < sparsity["token_ratio"] < 1
    assert 0 < sparsity["visual_ratio"] < 1
    assert printed["cache"]["method"] == "zipvl"
    assert sparsity["kv_bytes"] == printed["cache"]["cache_bytes"]
    assert run(options) == 0
    closing = capsys.readouterr().err
    assert f"{sparsity['token_ratio']:.1%} of the prompt's tokens took part" in closing


def test_a_short_prompt_says_that_it_was_dense(
    checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments(checkpoint, picture), "w5"]) == 0
    assert "every token took part in the prompt's attention (short)" in capsys.readouterr().err


def test_policies_store_differently(checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    widths = []
    for policy in ("evict", "quantize", "keep"):
        options = ["--set", f"policy={policy}", "--set", "min_tokens=0", "--json", "w5"]
        assert run([*arguments(checkpoint, picture), *options]) == 0
        widths.append(set(json.loads(capsys.readouterr().out)["cache"]["tokens_by_width"]))
    assert widths == [{"raw", "buffer"}, {"4-bit", "2-bit", "buffer"}, {"buffer"}]


def test_bad_pictures_are_one_line(checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = picture.with_name("notes.txt")
    text.write_text("no picture")
    for model, image, message in (
        (checkpoint, picture.with_name("none.png"), "no such file"),
        (checkpoint, text, "is no picture that can be read"),
        (zoo.path("tiny-lm"), picture, "reads no pictures"),
    ):
        assert run(["generate", "--model", str(model), "--image", str(image), "--cache", "zipvl", "w5"]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert len(captured.err.strip().splitlines()) == 1

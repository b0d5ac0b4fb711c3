"""`tersor generate --image`: a picture, a vision-language checkpoint of one's own, ZipVL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_models import IMAGE, SHAPE, build
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tersor import zoo
from tersor._errors import TersorError
from tersor.cli import run
from tersor.kv.cli import _inputs
from tersor.zoo import loading
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


def with_bos(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that begins every text with its BOS."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "hi": 2, "user": 3, "assistant": 4}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>", chat_template=template)


@pytest.mark.parametrize(
    ("template", "ids"),
    [
        ("{{ bos_token }} user {{ messages[0]['content'] }} assistant", [1, 3, 2, 4]),
        ("user {{ messages[0]['content'] }} assistant", [3, 2, 4]),
    ],
)
def test_a_template_alone_decides_on_special_tokens(template: str, ids: list[int]) -> None:
    tokenizer = with_bos(template)
    assert _inputs("x", tokenizer, "hi", chat=True)["input_ids"][0].tolist() == ids
    assert _inputs("x", tokenizer, "hi", chat=False)["input_ids"][0].tolist() == [1, 2]


def test_a_template_that_fails_is_named() -> None:
    with pytest.raises(TersorError, match="the chat template of x"):
        _inputs("x", with_bos("{{ messages[7]['content']['deep'] }}"), "hi", chat=True)
    with pytest.raises(TersorError, match="has no chat template"):
        _inputs("x", with_bos(""), "hi", chat=True)


class FilmProcessor:
    """Notes what it is asked, and takes videos."""

    chat_template, video_processor, tokenizer = "x", object(), with_bos("")

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        return "<s> " + " ".join(part["type"] for part in messages[0]["content"])

    def __call__(self, **given: Any) -> dict[str, Any]:
        return given


def test_pictures_and_a_video_reach_the_processor_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_processor", lambda _: FilmProcessor())
    given = _inputs("x", None, "hi", ["p", "q"], ["f", "g", "h"])
    assert given["text"] == ["<s> image image video text"]
    assert given["images"] == ["p", "q"] and given["videos"] == [["f", "g", "h"]]
    assert given["add_special_tokens"] is False
    assert "images" not in _inputs("x", None, "hi", [], ["f"])


def test_every_picture_is_read(checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for times in (1, 2):
        images = [each for _ in range(times) for each in ("--image", str(picture))]
        assert run(["generate", "--model", str(checkpoint), *images, "--max-new-tokens", "1", "--json", "w5"]) == 0
        counts.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    assert counts == [1 + 82, 1 + 2 * 82]


def test_videos_are_refused_where_the_processor_takes_none(
    checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "--model", str(checkpoint), "--video", str(picture), "w5"]) == 2
    assert "takes no videos" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:MistralConfig has no full-attention layer")
def test_text_is_written_although_no_layer_can_be_sparse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = zoo.load("tiny-lm")[1]
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, sliding_window=64, **shape)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = ["generate", "--model", str(tmp_path), "--cache", "zipvl", "--min-tokens", "0", "--max-new-tokens", "5"]
    capsys.readouterr()
    assert run([*asked, "--json", "a cold day " * 20]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert "text" in printed and "no full-attention layer" in printed["note"] and "sparsity" not in printed
    assert run([*asked, "a cold day " * 20]) == 0
    assert "no full-attention layer" in capsys.readouterr().err


def written(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert run(["generate", *options, "--json"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def test_a_saved_document_answers_as_one_that_is_read_with_the_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, text = str(tmp_path / "document.cache"), zoo.book()[:300]
    settings = ["--set", "high_bits=16", "--set", "low_bits=16"]
    read = written(capsys, text, *settings, "--save-cache", file, "--max-new-tokens", "0")
    assert read["text"] == "" and read["cache"]["tokens"] == read["prompt_tokens"]
    for question in (" The end", " A ship"):
        later = written(capsys, question, "--load-cache", file, "--max-new-tokens", "12")
        whole = written(capsys, text + question, *settings, "--max-new-tokens", "12")
        assert later["text"] == whole["text"]


def test_a_conversation_goes_on_from_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, text = str(tmp_path / "chat.cache"), zoo.book()[:300]
    first = written(capsys, text, "--save-cache", file, "--max-new-tokens", "12")
    second = written(capsys, " And", "--load-cache", file, "--save-cache", file, "--max-new-tokens", "6")
    third = written(capsys, " so", "--load-cache", file, "--max-new-tokens", "6")
    assert second["prompt_tokens"] > first["prompt_tokens"] + 12
    assert third["cache"]["tokens"] > second["cache"]["tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    {
        "nothing to keep": (["--save-cache", "x", "--cache", "none"], "leave --cache none out"),
        "no such file": (["--load-cache", "nothing"], "nothing: no such file"),
        "settings": (["--load-cache", "x", "--set", "high_bits=8"], "leave --cache, --set and --chat out"),
        "method": (["--load-cache", "x", "--cache", "minicache"], "leave --cache, --set and --chat out"),
        "chat": (["--load-cache", "x", "--chat"], "leave --cache, --set and --chat out"),
        "a folder": (["--save-cache", "."], "--save-cache . is a folder"),
        "nothing to do": (["--max-new-tokens", "0"], "at least 1, or 0 with --save-cache"),
        "a picture": (["--save-cache", "x", "--image", "pic.png"], "leave --image and --video out"),
    }.values(),
)
def test_what_no_file_can_do_is_refused_before_the_model_is_loaded(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the model was loaded"))
    assert run(["generate", "text", *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""The pipeline: classes and prompts in, pictures and clips out."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nar_models import TEXT, model
from PIL import Image
from transformers import BatchEncoding, T5Config, T5EncoderModel

from tersor.grids import vq
from tersor.grids.nar import convert as nar_convert
from tersor.grids.nar.pipeline import FrameTokenizer, NARPipeline, T5Features, TubeletTokenizer, WordFeatures
from tersor.grids.tokenizer import PatchTokenizer, PatchTokenizerConfig

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def tokenizer(channels: int = 3, size: int = 20) -> PatchTokenizer:
    made = PatchTokenizer(PatchTokenizerConfig(patch_size=2, channels=channels, codebook_size=size))
    values = torch.rand(made.codebook.shape, generator=torch.Generator().manual_seed(0))
    made.codebook.copy_(values)
    return made


class Words:
    """A tokenizer of words, which pads on the right like T5's."""

    def __call__(self, prompts, max_length, **settings):
        rows = [[*[len(word) for word in prompt.split()][: max_length - 1], 1] for prompt in prompts]
        ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})


def features() -> T5Features:
    torch.manual_seed(0)
    settings = {"vocab_size": 30, "d_model": 10, "d_kv": 5, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    return T5Features(T5EncoderModel(T5Config(**settings)).eval(), Words(), tokens=7)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_type_are_the_decoded_ids(channels) -> None:
    of, codes = model((3, 4)), tokenizer(channels)
    pipeline = NARPipeline(of, codes)

    def make(kind):
        generator = torch.Generator().manual_seed(0)
        return pipeline([1, 2], num_images_per_prompt=2, generator=generator, guidance_scale=3.0, output_type=kind)

    ids = of.generate(torch.tensor([1, 1, 2, 2]), generator=torch.Generator().manual_seed(0), guidance_scale=3.0)
    pixels = make("pt").images
    assert torch.equal(pixels, codes.decode(ids)) and pixels.shape == (4, channels, 6, 8)
    assert np.array_equal(make("np").images, pixels.permute(0, 2, 3, 1).numpy())
    out = make("pil")
    assert len(out.images) == 4 and out.frames is None and out.forward_passes == 6
    expected = (pixels[3] * 255).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
    assert isinstance(out.images[3], Image.Image) and np.array_equal(np.asarray(out.images[3]), expected)


def test_videos_have_frames() -> None:
    of, codes = model((2, 3, 2)), FrameTokenizer(tokenizer())
    pipeline = NARPipeline(of, codes)
    out = pipeline(3, output_type="pil")
    assert out.images is None and len(out.frames) == 1 and len(out.frames[0]) == 2
    assert out.frames[0][0].size == (4, 6)
    assert pipeline(3, output_type="np").frames.shape == (1, 2, 6, 4, 3)
    frames = pipeline(3, output_type="pt").frames
    assert frames.shape == (1, 2, 3, 6, 4)
    assert torch.equal(codes.decode(codes.encode(frames)), frames)


def test_prompts_are_padded_on_the_left_and_the_empty_one_has_no_tokens() -> None:
    encode = features()
    found, mask = encode(["a red bicycle", "", "one two three four five six seven eight"])
    assert mask.tolist() == [[0, 0, 0, 1, 1, 1, 1], [0] * 7, [1] * 7]
    alone = encode.encoder(input_ids=torch.tensor([[1, 3, 7, 1]])).last_hidden_state
    torch.testing.assert_close(found[0, 3:], alone[0], atol=1e-5, rtol=1e-5)


def test_a_prompt_makes_the_image_of_its_features() -> None:
    of, encode = model((2, 3), **TEXT), features()
    pipeline = NARPipeline(of, tokenizer(), encode)
    out = pipeline(prompt="a red bicycle", temperature=0, output_type="pt").images
    found, mask = encode(["a red bicycle"])
    ids = of.generate(text_features=found, text_mask=mask, temperature=0)
    assert torch.equal(out, tokenizer().decode(ids))
    both = pipeline(prompt=["a red bicycle", ""], temperature=0, output_type="pt").images
    torch.testing.assert_close(both[:1], out)


def test_a_model_without_condition_makes_as_many_as_asked() -> None:
    pipeline = NARPipeline(model((2, 3), condition="none"), tokenizer())
    assert len(pipeline(num_images_per_prompt=3).images) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"class_labels": 1, "output_type": "jpg"}, "output_type='jpg' must be one of"),
        ({"class_labels": 1, "prompt": "a"}, "not both"),
        ({"prompt": "a"}, "needs a text encoder"),
        ({}, "give class_labels"),
        ({"class_labels": 1, "num_images_per_prompt": 0}, "at least 1"),
    ],
)
def test_bad_calls(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        NARPipeline(model((2, 2)), tokenizer())(**given)


def test_classes_may_be_given_by_name_and_each_sample_its_generator() -> None:
    of = model((2, 2), id2label={0: "cat", 1: "dog", 2: "c", 3: "d", 4: "e"})
    pipeline = NARPipeline(of, tokenizer())

    def drawn(labels, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(labels, generator=generators, output_type="pt").images

    assert torch.equal(drawn(["dog", "cat"], (1, 2)), drawn([1, 0], (1, 2)))
    assert torch.equal(drawn("dog", (1,))[0], drawn(torch.tensor([1, 0]), (1, 2))[0])
    with pytest.raises(ValueError, match="'bird' is no class"):
        pipeline("bird")


def test_a_tokenizer_of_another_model_is_refused() -> None:
    for codes in (tokenizer(size=21), FrameTokenizer(tokenizer(size=21))):
        with pytest.raises(ValueError, match="has 21 ids, the model 20"):
            NARPipeline(model((2, 2)), codes)


def test_the_example_runs(monkeypatch, tmp_path, capsys) -> None:
    of = model((3, 3), num_classes=1000)
    monkeypatch.setattr(nar_convert, "convert_nar", lambda path, grid_size: of)
    monkeypatch.setattr(vq, "convert_vq", lambda path: tokenizer())
    out = tmp_path / "sheet.png"
    arguments = ["nar.pt", "vq.pt", "--classes", "207", "88", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["nar_imagenet.py", *arguments])
    runpy.run_path(str(EXAMPLES / "nar_imagenet.py"), run_name="__main__")
    assert "5 forward passes instead of 9" in capsys.readouterr().out
    with Image.open(out) as sheet:
        assert sheet.size == (2 * 6, 6)


def test_only_pictures_need_pillow(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    pipeline = NARPipeline(model((2, 2)), SimpleNamespace(decode=lambda ids: torch.zeros(1, 3, 4, 4)))
    assert pipeline(1, output_type="np").images.shape == (1, 4, 4, 3)
    with pytest.raises(ImportError, match=r"extra images.*pip install"):
        pipeline(1)


def test_a_tubelet_is_some_frames_of_a_patch() -> None:
    codes = TubeletTokenizer(tokenizer(channels=2), 2)
    ids = torch.randint(0, 20, (3, 2, 4, 5), generator=torch.Generator().manual_seed(0))
    clips = codes.decode(ids)
    assert clips.shape == (3, 4, 1, 8, 10) and codes.codebook_size == 20
    entry = codes.tokenizer.codebook[ids[1, 1, 2, 3]].view(2, 2, 2)
    assert torch.equal(clips[1, 2:4, 0, 4:6, 6:8], entry), "frames 2 and 3 of the second token"
    assert torch.equal(codes.encode(clips), ids)
    with pytest.raises(ValueError, match="not a multiple of depth=2"):
        codes.encode(clips[:, :3])
    assert FrameTokenizer(tokenizer()).codebook_size == 20


def test_words_are_channels_and_padding_is_on_the_left() -> None:
    encoder = WordFeatures(("a", "thin", "one"), 4)
    features, mask = encoder(["A thin, one", ""])
    assert mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 0]]
    assert features[0].argmax(-1).tolist()[1:] == [0, 1, 2] and not features[1].any()
    torch.testing.assert_close(features[0, 1:].square().mean(-1), torch.ones(3))
    with pytest.raises(ValueError, match="does not know \\['two'\\]"):
        encoder(["a two"])
    with pytest.raises(ValueError, match="has 5 words"):
        encoder(["a a a a a"])

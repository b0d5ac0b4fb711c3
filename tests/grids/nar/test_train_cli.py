"""`tersor train`: from pictures to a model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from invoke import run
from nar_models import model, tokenizer

from tersor._weights import fingerprint
from tersor.grids.cli import images
from tersor.grids.drawing import as_png
from tersor.grids.llamagen import LlamaGen, LlamaGenConfig
from tersor.grids.nar.heads import NARForImageGeneration
from tersor.grids.nar.tokens import Tokens
from tersor.grids.nar.train_cli import train


@pytest.fixture
def pictures(tmp_path) -> Path:
    pixels = torch.rand(12, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    for index, image in enumerate(pixels):
        file = tmp_path / "pictures" / f"{index % 3}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(as_png(image[None]))
    return tmp_path / "pictures"


def test_from_pictures_to_a_model_that_draws(pictures, tmp_path) -> None:
    vq, file, out = tokenizer(1, tmp_path / "vq"), tmp_path / "tokens.safetensors", tmp_path / "out"
    facts = json.loads(
        run(train, "tokens", "--images", str(pictures), "--tokenizer", str(vq), "--out", str(file), "--json").stdout
    )
    assert facts["grid"] == [3, 4] and facts["samples"] == 12 and facts["conditions"] == ["class_labels"]
    options = ["--tokens", str(file), "--out", str(out), "--steps", "4", "--batch-size", "4", "--size", "32x1x2"]
    drawing = ["--sample-every", "2", "--held-out", "3", "--schedule", "cosine"]
    found = json.loads(run(train, "nar", *options, *drawing, "--json").stdout)
    assert found["eval_loss"] > 0 and found["curve"][-1]["step"] == 4
    assert sorted(each.name for each in (out / "samples").iterdir()) == [f"step-{step:07}.png" for step in (0, 2, 4)]
    made = NARForImageGeneration.from_pretrained(out / "model")
    assert made.config.num_classes == 3 and made.config.grid_size == (3, 4)
    assert fingerprint(out / "model" / "tokenizer") == fingerprint(vq), "what made the tokens is saved with the model"
    sheet = tmp_path / "sheet.png"
    text = run(images, "generate", "--model", str(out / "model"), "-n", "5", "--out", str(sheet)).output
    assert "5 samples" in text and "6 forward passes each instead of 12" in text
    assert sheet.read_bytes().startswith(b"\x89PNG")
    options[options.index("4")] = "6"
    assert json.loads(run(train, "nar", *options, *drawing, "--json").stdout)["curve"][-1]["step"] == 6


def test_names_of_folders_are_names_of_classes_to_the_end(tmp_path) -> None:
    image, vq = pytest.importorskip("PIL.Image"), tokenizer(1, tmp_path / "vq")
    file, out = tmp_path / "t.safetensors", tmp_path / "run"
    for number, name in enumerate(("cat", "dog 2", "dog 10")):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        image.new("L", (8, 6), 40 * number).save(folder / "a.png")
    run(train, "tokens", "--images", str(tmp_path / "pictures"), "--tokenizer", str(vq), "--out", str(file))
    assert Tokens.load(file).class_names == ("cat", "dog 2", "dog 10")
    assert Tokens.load(file).split(1, seed=0)[0].class_names == ("cat", "dog 2", "dog 10")
    run(train, "nar", "--tokens", str(file), "--out", str(out), "--steps", "1", "--size", "32x1x2")
    config = NARForImageGeneration.from_pretrained(out / "model").config
    assert config.id2label == {0: "cat", 1: "dog 2", 2: "dog 10"} and config.num_classes == 3

    def make(labels: str) -> list[int]:
        arguments = ["--model", str(out / "model"), "-n", "2", "--labels", labels, "--out", str(tmp_path / "a.png")]
        return json.loads(run(images, "generate", *arguments, "--json").stdout)["conditions"]

    assert make("dog 10,cat") == [2, 0] and make("1,2") == [1, 2]
    with pytest.raises(ValueError, match="--labels bird: 'bird' is no class of this model; it has cat, dog 2, dog 10"):
        make("bird")


def test_another_tokenizer_than_the_one_of_the_tokens_is_refused(tmp_path) -> None:
    vq, other = tokenizer(1, tmp_path / "vq"), tokenizer(2, tmp_path / "other")
    file = tmp_path / "t.safetensors"
    Tokens(torch.zeros(8, 3, 4, dtype=torch.long), 20, {}, tokenizer=("vq", fingerprint(vq))).save(file)
    options = ["--tokens", str(file), "--out", str(tmp_path / "out"), "--steps", "1", "--size", "32x1x2"]
    with pytest.raises(ValueError, match="has other weights than vq, which made the tokens"):
        run(train, "nar", *options, "--tokenizer", str(other))
    assert not (tmp_path / "out").exists()
    text = run(train, "nar", *options).output  # where "vq" is no longer: said, and trained without
    assert "It has no image tokenizer" in text and not (tmp_path / "out" / "model" / "tokenizer").exists()


@pytest.mark.parametrize(("depth", "frames"), [(2, 0), (0, 4), (3, 4)])
def test_depth_is_for_clips_and_divides_them(tmp_path, depth, frames) -> None:
    shape = (2, frames, 6, 8, 1) if frames else (2, 6, 8)
    np.savez(tmp_path / "a.npz", images=np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match=f"--depth {depth}: .* holds"):
        run(train, "tokens", "--images", str(tmp_path / "a.npz"), "--depth", str(depth))


def test_accelerate_launches_the_module(tmp_path) -> None:
    file, out = tmp_path / "tokens.safetensors", tmp_path / "out"
    Tokens(torch.randint(0, 20, (8, 3, 4)), 20, {"class_labels": torch.arange(8) % 5}).save(file)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "tersor"]
    options = ["--tokens", str(file), "--out", str(out), "--steps", "2", "--batch-size", "2", "--size", "32x1x2"]
    done = subprocess.run([*launch, "train", "nar", *options], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert str(out / "model") in done.stdout
    assert NARForImageGeneration.from_pretrained(out / "model").config.num_classes == 5


def test_training_starts_from_a_model(tmp_path) -> None:
    ids = torch.randint(0, 20, (8, 3, 4), generator=torch.Generator().manual_seed(0))
    file = tmp_path / "tokens.safetensors"
    Tokens(ids, 20, {"class_labels": torch.arange(8) % 5}).save(file)
    raster = LlamaGen(
        LlamaGenConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_classes=5,
                       grid_size=(3, 4))
    )  # fmt: skip
    raster.save_pretrained(tmp_path / "raster")
    model((3, 4)).save_pretrained(tmp_path / "nar")
    for name in ("raster", "nar"):
        options = ["--tokens", str(file), "--out", str(tmp_path / f"from-{name}"), "--steps", "1", "--batch-size", "8"]
        rate = ["--learning-rate", "1e-9", "--dropout", "0"]
        run(train, "nar", *options, *rate, "--start-from", str(tmp_path / name), "--json")
    made = NARForImageGeneration.from_pretrained(tmp_path / "from-raster" / "model")
    torch.testing.assert_close(made.outputs[1].weight, raster.output.weight, atol=1e-6, rtol=0)
    made = NARForImageGeneration.from_pretrained(tmp_path / "from-nar" / "model")
    torch.testing.assert_close(made.outputs[0].weight, model((3, 4)).outputs[0].weight, atol=1e-6, rtol=0)
    assert made.config.token_dropout == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps=0"),
        (["--schedule", "linear"], "must be one of"),
        (["--size", "huge"], "must be one of"),
        (["--size", "32x0x2"], "must be one of"),
        (["--size", "34x1x2"], "multiple of"),
        (["--held-out", "8"], "both parts"),
        (["--held-out", "-1"], "negative"),
        (["--sample-every", "2"], "give the --tokenizer"),
        (["--sample-every", "2", "--tokenizer", "tiny-raster"], "128 ids, the tokens 20"),
        (["--start-from", "/no/such/folder"], "no config.json"),
        (["--tokens", "/no/such/file"], "no such file"),
        (["--dropout", "1"], "token_dropout"),
    ],
)
def test_bad_training(tmp_path, arguments, message) -> None:
    file = tmp_path / "tokens.safetensors"
    Tokens(torch.zeros(8, 3, 4, dtype=torch.long), 20, {"class_labels": torch.arange(8)}).save(file)
    options = {"--tokens": str(file), "--out": str(tmp_path / "out"), "--steps": "2", "--size": "32x1x2"}
    options |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    with pytest.raises(ValueError, match=re.escape(message)):
        run(train, "nar", *(each for pair in options.items() for each in pair))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "/no/such/folder"], "give a folder"),
        (["--out", "tokens.npz"], "must end in .safetensors"),
        (["--depth", "-1"], "number of frames"),
        (["--tokenizer", "/no/such/folder"], "no image tokenizer"),
    ],
)
def test_bad_extraction(pictures, arguments, message) -> None:
    options = {"--images": str(pictures), **dict(zip(arguments[::2], arguments[1::2], strict=True))}
    with pytest.raises(ValueError, match=message):
        run(train, "tokens", *(each for pair in options.items() for each in pair))

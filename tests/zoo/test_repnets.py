"""tiny-repvgg and tiny-mobileone are what their cards say, and their recipe still makes them."""

from __future__ import annotations

import io
import json
import zipfile

import pytest
import torch
from PIL import Image

from tersor import zoo
from tersor.ptq.bench.data import ARCHIVE, SHA256, photo_crops
from tersor.ptq.networks import RepNet, RepNetConfig
from tersor.ptq.reparam import merge

NAMES = ("tiny-repvgg", "tiny-mobileone")


@pytest.mark.parametrize("name", NAMES)
def test_the_card_quotes_the_lock(name) -> None:
    lock = json.loads((zoo.path(name) / "recipe.lock.json").read_text())
    net, card = zoo.load_network(name), zoo.card(name)
    assert lock["parameters"] == sum(each.numel() for each in net.parameters())
    assert lock["sha256"] == SHA256 and lock["scores"]["n"] == 10_000
    assert f"{100 * lock['scores']['accuracy']:.1f} %" in card and "Trained on CIFAR-10." in card
    assert f"{lock['parameters']:,}" in card
    assert lock["scores"]["low"] > {"tiny-repvgg": 0.74, "tiny-mobileone": 0.6}[name]


def test_kernels_are_as_the_cards_say() -> None:
    for name in NAMES:
        net = zoo.load_network(name)
        merged = merge(net, net.normalize(photo_crops(zoo.photos()[:1])[:8]))
        told = json.loads((zoo.path(name) / "recipe.lock.json").read_text())["kernels"]
        found = {}
        for full, layer in merged.named_modules():
            if isinstance(layer, torch.nn.Conv2d):
                rows = layer.weight.detach().abs().flatten(1)
                found[full.removesuffix(".merged")] = float((rows.amax(1) / rows.median(1).values).max())
        assert found == pytest.approx(told, rel=0.02)


def test_other_models_say_what_they_are() -> None:
    with pytest.raises(ValueError, match="classifies no images"):
        zoo.load_network("tiny-lm")
    with pytest.raises(ValueError, match=r"load it with zoo.load_network\('tiny-repvgg'\)"):
        zoo.load_model("tiny-repvgg")
    with pytest.raises(ValueError, match="has no tokenizer"):
        zoo.load("tiny-repvgg")


def test_a_network_comes_back_as_it_was_saved(tmp_path) -> None:
    net = RepNet(RepNetConfig(kind="mobileone", widths=(8,), depths=(1,), strides=(1,))).eval()
    net.save_pretrained(tmp_path)
    back = RepNet.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    assert back.config == net.config and torch.equal(back(x), net(x))
    with pytest.raises(ValueError, match="kind='resnet'"):
        RepNetConfig(kind="resnet")
    with pytest.raises(ValueError, match="one value a stage"):
        RepNetConfig(widths=(8, 16))


def test_the_recipe_runs_and_resumes(tmp_path, capsys) -> None:
    import tiny_repvgg

    crops = photo_crops(zoo.photos()[:4])
    with zipfile.ZipFile(tmp_path / ARCHIVE, "w") as archive:
        for index, pixels in enumerate(crops[:100]):
            stored = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(stored, "JPEG")
            archive.writestr(f"{'train' if index < 80 else 'test'}/{'ab'[index % 2]}/{index}.jpg", stored.getvalue())
    command = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--smoke"]
    for _ in range(2):
        assert tiny_repvgg.main(command, kind="mobileone") == 0
    assert capsys.readouterr().out.count("'epoch': 1") == 1  # the second run had nothing left to train
    made = tmp_path / "out" / "tiny-mobileone"
    assert json.loads((made / "recipe.lock.json").read_text())["plan"]["epochs"] == 1
    assert RepNet.from_pretrained(made).config.classes == ("a", "b")
    assert tiny_repvgg.main(["--data", str(tmp_path / "out"), "--out", str(tmp_path)]) == 2
    assert "no cifar10_jpeg.zip in this folder" in capsys.readouterr().err


def test_crops_and_mirrors_are_of_the_image() -> None:
    from repvgg.train import augment

    pixels = torch.arange(2 * 3 * 32 * 32, dtype=torch.int32).view(2, 3, 32, 32) + 1
    made = augment(pixels, 4, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(pixels, [4] * 4)
    places = {
        (row, column, flip): torch.equal(made[index], padded[index, :, row : row + 32, column : column + 32].flip(-1)
                                         if flip else padded[index, :, row : row + 32, column : column + 32])
        for index in range(2) for row in range(9) for column in range(9) for flip in (False, True)
    }  # fmt: skip
    assert made.shape == pixels.shape and sum(places.values()) >= 1

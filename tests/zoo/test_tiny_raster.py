"""tiny-raster is what its card says, and its recipe still makes it."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch

from tersor import zoo
from tersor.grids.llamagen import LlamaGen
from tersor.grids.tokenizer import load_tokenizer
from tersor.grids.zipar.bench.quality import SAMPLING


@pytest.fixture(scope="module")
def lock() -> dict:
    return json.loads((zoo.path("tiny-raster") / "recipe.lock.json").read_text(encoding="utf-8"))


def test_it_loads_as_its_own_class() -> None:
    model = zoo.load_model("tiny-raster")
    assert isinstance(model, LlamaGen)
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config.grid_size == (14, 14)
    assert model.config.vocab_size == zoo.load_image_tokenizer("tiny-raster").codebook_size


def test_a_model_of_ids_has_no_text_tokenizer() -> None:
    with pytest.raises(ValueError, match="has no tokenizer"):
        zoo.load("tiny-raster")


def test_scores_are_what_the_goal_asks_for(lock: dict) -> None:
    scores = lock["scores"]
    assert scores["classifier_accuracy"]["share"] >= 0.985
    assert scores["reconstruction_mse"] < 0.001
    # The judge hardly tells reconstructions from other real images.
    floors = scores["frechet_floors"]
    assert max(floors["reconstructed"]) < 1.5 * max(floors["real"])
    assert lock["minutes"] <= 60
    size = sum(file.stat().st_size for file in zoo.path("tiny-raster").rglob("*") if file.is_file())
    assert size < 4_000_000


def test_the_card_quotes_the_lock(lock: dict) -> None:
    card = zoo.card("tiny-raster")
    assert f"{lock['scores']['held_out_nats_per_token']:.4f}" in card
    assert f"{100 * lock['scores']['classifier_accuracy']['share']:.2f}" in card
    assert "CC BY-SA 3.0" in card


def test_the_shipped_weights_draw_the_class_that_is_asked_for() -> None:
    model, tokenizer = zoo.load_model("tiny-raster"), zoo.load_image_tokenizer("tiny-raster")
    classifier, reference = zoo.load_judge("tiny-raster")
    labels = torch.arange(10).repeat(6)
    ids = model.generate(labels, generator=torch.Generator().manual_seed(0), **SAMPLING)
    images = tokenizer.decode(ids.view(-1, 14, 14))
    features, guesses = classifier.judge(images)
    assert (guesses == labels).float().mean() > 0.75
    noise, _ = classifier.judge(torch.rand(60, 1, 28, 28, generator=torch.Generator().manual_seed(1)))
    assert reference.distance(features) < reference.distance(noise) / 3


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch):
    """The recipe as a function of its arguments, in this process: most of its time would be spent on imports."""
    threads = torch.get_num_threads()
    import tiny_raster

    yield tiny_raster.main
    torch.set_num_threads(threads)


def test_the_recipe_runs_and_resumes(recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke = ["--data", "procedural", "--out", str(tmp_path), "--smoke", "--threads", "1"]
    assert recipe(smoke) == 0
    assert "codebook, round" in capsys.readouterr().out
    weights = (tmp_path / "tiny-raster" / "model.safetensors").read_bytes()
    assert torch.load(tmp_path / "state.pt", weights_only=True)["progress"]["step"] == 4
    assert recipe(smoke) == 0
    assert "codebook, round" not in capsys.readouterr().out
    assert (tmp_path / "tiny-raster" / "model.safetensors").read_bytes() == weights
    assert LlamaGen.from_pretrained(tmp_path / "tiny-raster").config.grid_size == (14, 14)
    assert load_tokenizer(tmp_path / "tiny-raster" / "tokenizer").codebook_size == 128
    assert (tmp_path / "tiny-raster" / "CARD.md").is_file()


def test_a_resumed_run_gives_what_an_uninterrupted_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raster.data import load
    from raster.train import Plan, Trainer, fit_tokenizer

    plan = Plan(images=140, rounds=2, hidden=32, layers=1, heads=2, steps=4, batch=4, codebook=32)
    split = load("procedural", seed=1, count=plan.images, download=tmp_path)
    tokenizer = fit_tokenizer(plan, split, 1, tmp_path / "tokenizer")

    def trainer(name: str) -> Trainer:
        return Trainer(plan, 1, tokenizer, split, tmp_path / name)

    whole = trainer("whole.pt")
    whole.run(look_every=2, looked_at=8)
    first = trainer("parts.pt")
    for _ in range(2):
        first.kept.advance(first.train_step)
    first.kept.save(now=True)
    second = trainer("parts.pt")
    assert second.progress.step == 2
    second.run(look_every=2, looked_at=8)
    for name, each in whole.model.state_dict().items():
        assert torch.equal(each, second.model.state_dict()[name]), name
    with pytest.raises(ValueError, match="another plan or seed"):
        Trainer(plan, 2, tokenizer, split, tmp_path / "parts.pt")


def test_strokes_have_their_classes_and_fit_the_canvas(monkeypatch: pytest.MonkeyPatch) -> None:
    from raster.data import draw_strokes

    pixels, labels = draw_strokes(200, seed=3)
    assert pixels.shape == (200, 1, 28, 28)
    assert labels.unique().tolist() == list(range(10))
    assert pixels[:, :, [0, -1]].max() == 0 and pixels[..., [0, -1]].max() == 0
    assert pixels.flatten(1).max(1).values.min() > 0.9
    assert torch.equal(draw_strokes(200, seed=3)[0], pixels)


def test_the_recipe_refuses_bad_data_early(recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"tiny_raster: --data {tmp_path}: no mnist_png.zip")


def test_a_fetched_archive_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image
    from raster import data as tiny_raster_data

    archive = tmp_path / "source.zip"
    with zipfile.ZipFile(archive, "w") as bundle:
        for index in range(14):
            content = io.BytesIO()
            Image.new("L", (28, 28), 10 * index).save(content, "PNG")
            bundle.writestr(f"train/{index % 10}/{index}.png", content.getvalue())
    monkeypatch.setattr(tiny_raster_data, "URL", archive.as_uri())
    split = tiny_raster_data.load("mnist", seed=1, count=None, download=tmp_path / "out")
    assert (tmp_path / "out" / "mnist_png.zip").read_bytes() == archive.read_bytes()
    assert (len(split.train), len(split.held_out)) == (12, 2)
    # Pixels and labels keep together, and the order is not the archive's.
    numbers = [round(25.5 * image.mean().item()) for image in torch.cat([split.held_out, split.train])]
    assert sorted(numbers) == list(range(14)) != numbers
    assert [number % 10 for number in numbers] == torch.cat([split.held_out_labels, split.train_labels]).tolist()

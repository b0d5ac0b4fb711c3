"""The NAR models of the zoo are what their cards say, and their recipes still make them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tersor import zoo
from tersor.grids.judge import ClipClassifier
from tersor.grids.nar.baselines import PARForImageGeneration, RasterVideo
from tersor.grids.nar.bench.quality import Settings, decodings, one_sided, sample, score_captions
from tersor.grids.nar.captions import WORDS, Captions
from tersor.grids.nar.heads import NARForImageGeneration
from tersor.grids.nar.pipeline import NARPipeline

NAMES = ("tiny-nar", "tiny-nar-text", "tiny-nar-video")
SETTINGS = Settings(temperature=0.9, guidance=1.5)


def lock_of(folder: Path) -> dict:
    return json.loads((folder / "recipe.lock.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_as_its_own_class(name) -> None:
    model = zoo.load_model(name)
    assert isinstance(model, NARForImageGeneration) and model.dtype == torch.float32 and not model.training
    assert model.config.vocab_size == zoo.load_image_tokenizer(name).codebook_size
    assert sum(p.numel() for p in model.parameters()) == lock_of(zoo.path(name))["parameters"]


def test_what_they_are_compared_with_has_the_same_backbone_and_steps() -> None:
    kinds = {name: {kind: type(each) for kind, each in zoo.load_compared(name).items()} for name in NAMES}
    assert kinds["tiny-nar"]["par4x"] is kinds["tiny-nar"]["par14x"] is PARForImageGeneration
    assert set(kinds["tiny-nar"]) == {"raster", "par4x", "par14x", "single-head"}
    assert set(kinds["tiny-nar-video"]) == {"raster", "single-head"} and not kinds["tiny-nar-text"]
    assert kinds["tiny-nar-video"]["raster"] is RasterVideo
    for name in ("tiny-nar", "tiny-nar-video"):
        own = lock_of(zoo.path(name))["plan"]
        for kind, each in zoo.load_compared(name).items():
            assert lock_of(zoo.path(name) / "compared" / kind)["plan"] == own
            assert each.config.hidden_size == own["hidden"] and each.config.num_hidden_layers == own["layers"]


@pytest.mark.parametrize("name", NAMES)
def test_the_card_quotes_the_lock(name) -> None:
    lock = lock_of(zoo.path(name))
    assert f"{lock['scores']['held_out_nats_per_token']:.4f}" in zoo.card(name)
    assert f"{lock['parameters']:,} parameters" in zoo.card(name) and "CC BY-SA 3.0" in zoo.card(name)


def test_the_video_judge_is_good_enough() -> None:
    lock = lock_of(zoo.path("tiny-nar-video"))
    assert lock["scores"]["classifier_accuracy"]["low"] > 0.9
    assert lock["scores"]["classifier_accuracy_reconstructed"]["low"] > 0.9


def test_the_shipped_weights_draw_the_class_that_is_asked_for() -> None:
    """Chance is a tenth; the full figures are in docs/nar.md."""
    for name, least in (("tiny-nar", 0.85), ("tiny-nar-video", 0.75)):
        (nar, *_) = decodings(zoo.load_model(name), {})
        tokenizer = zoo.load_video_tokenizer(name) if "video" in name else zoo.load_image_tokenizer(name)
        found = sample(nar, tokenizer, zoo.load_judge(zoo.judge_of(name)), SETTINGS, samples=60, seed=0)
        assert sum(found.right) / 60 > least, name


def test_captions_are_heeded() -> None:
    name = "tiny-nar-text"
    pipeline = NARPipeline(zoo.load_model(name), zoo.load_image_tokenizer(name), zoo.load_text_encoder(name))
    classifier, _ = zoo.load_judge(zoo.judge_of(name))
    scores = score_captions(pipeline, classifier, Captions.load(zoo.path(name)), SETTINGS, samples=60, seed=0)
    # Chance is a tenth and a third.
    assert scores.share("digit").value > 0.25 and scores.share("stroke").value > 0.6
    with pytest.raises(ValueError, match="does not know"):
        pipeline(prompt="a thick horse")
    assert "horse" not in WORDS


@pytest.fixture
def recipes():
    """The recipes as functions of their arguments, in this process: most of their time would be spent on imports."""
    threads = torch.get_num_threads()
    import tiny_nar
    import tiny_nar_text
    import tiny_nar_video

    yield {"tiny-nar": tiny_nar, "tiny-nar-text": tiny_nar_text, "tiny-nar-video": tiny_nar_video}
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_is_the_one_that_made_it(recipes, name) -> None:
    assert lock_of(zoo.path(name))["plan"] == json.loads(json.dumps(asdict(recipes[name].FULL)))


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_runs_and_a_second_run_changes_nothing(recipes, name, tmp_path: Path) -> None:
    smoke = ["--data", "procedural", "--out", str(tmp_path), "--smoke", "--threads", "1"]
    assert recipes[name].main(smoke) == 0
    folder = tmp_path / name
    weights = (folder / "model.safetensors").read_bytes()
    lock = lock_of(folder)
    assert lock["curve"][-1]["step"] == lock["plan"]["training"]["steps"] == 4
    assert recipes[name].main(smoke) == 0
    assert (folder / "model.safetensors").read_bytes() == weights
    assert f"# {name}" in (folder / "CARD.md").read_text(encoding="utf-8")
    assert (folder / "tokenizer" / "config.json").is_file()


def test_what_is_compared_goes_beside_it(recipes, tmp_path: Path) -> None:
    smoke = ["--data", "procedural", "--out", str(tmp_path), "--smoke", "--threads", "1"]
    for kind, made in (
        ("par4x", PARForImageGeneration),
        ("par14x", PARForImageGeneration),
        ("single-head", NARForImageGeneration),
    ):
        assert recipes["tiny-nar"].main([*smoke, "--kind", kind]) == 0
        assert made.from_pretrained(tmp_path / "tiny-nar" / "compared" / kind).config.grid_size == (14, 14)
    assert recipes["tiny-nar-video"].main([*smoke, "--kind", "raster"]) == 0
    made = RasterVideo.from_pretrained(tmp_path / "tiny-nar-video" / "compared" / "raster")
    assert (made.config.grid_size, made.config.frames) == ((28, 7), 4)


def test_clips_move_by_a_pixel_a_frame(recipes) -> None:
    from nar.clips import DIRECTIONS, moving, own_direction

    images = torch.zeros(40, 1, 28, 28)
    images[:, :, 4:24, 4:24] = 1.0
    digits = torch.arange(40) % 10
    clips = moving(images, digits, own_direction(digits))
    assert clips.pixels.shape == (40, 8, 1, 28, 28) and torch.equal(clips.digits, digits)
    torch.testing.assert_close(clips.pixels.sum((2, 3, 4)), torch.full((40, 8), 20.0**2))
    for axis, reduced in ((0, -1), (1, -2)):
        starts = clips.pixels[:, :, 0].amax(reduced).argmax(-1)
        steps = torch.tensor([DIRECTIONS[each][axis] for each in clips.directions])
        assert (starts.diff(dim=1) == steps[:, None]).all()
        assert starts[:, 0].tolist() == [{1: 0, 0: 4, -1: 8}[int(each)] for each in steps], "the middle if it stays"


def test_a_digit_has_its_own_direction_but_where_the_classifier_learns(recipes) -> None:
    from nar.clips import DIRECTIONS, clips_of, judged_clips
    from raster.data import load

    assert len(DIRECTIONS) == ClipClassifier.DIRECTIONS
    split = load("procedural", seed=0, count=350, download=Path())
    for clips in clips_of(split):
        assert torch.equal(clips.directions, clips.digits % 3)
    judged = judged_clips(split, seed=0, count=200)
    assert len({*zip(judged.digits.tolist(), judged.directions.tolist(), strict=True)}) > 27
    assert torch.equal(judged.pixels, judged_clips(split, seed=0, count=200).pixels)


def test_the_single_head_has_a_target_for_each_neighbour(recipes) -> None:
    """In training the mean of the predictions' losses; in evaluation that of the mixed logits, as all others."""
    from dataclasses import replace

    from tiny_nar_video import SMOKE, new_model

    plan = replace(SMOKE, codebook=20)
    trained, same = (new_model("single-head", plan, (1, 3, 4)) for _ in range(2))
    for each in (trained, same):
        each.config.condition_dropout = 0.0
        each.outputs[0].weight.data.normal_(generator=torch.Generator().manual_seed(0))
    del same._loss  # the class's own again
    ids, labels = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(1)), torch.tensor([1, 2])
    given = {"class_labels": labels, "labels": ids}
    assert torch.equal(trained.eval()(ids, **given).loss, same.eval()(ids, **given).loss)
    right, below = (one_sided(same, mixing)(ids, **given).logits.view(2, 3, 4, 20) for mixing in ("right", "below"))
    # One-sided mixing falls back to the other axis at the borders, where there is one prediction.
    both = [F.cross_entropy(each.flatten(0, 2), ids.flatten()) for each in (right, below)]
    torch.testing.assert_close(trained.train()(ids, **given).loss, sum(both) / 2)
    assert type(trained) is NARForImageGeneration, "and so it is saved"


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_refuses_bad_data_early(recipes, name, tmp_path, capsys) -> None:
    assert recipes[name].main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no mnist_png.zip" in capsys.readouterr().err

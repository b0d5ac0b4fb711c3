"""The benchmark of raster models, on a small untrained one; and its command on the trained one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tersor.bench.runs import Finished
from tersor.grids.judge import DigitClassifier, Reference
from tersor.grids.llamagen import LlamaGen, LlamaGenConfig
from tersor.grids.samples import Samples
from tersor.grids.tokenizer import PatchTokenizer
from tersor.grids.zipar.bench import quality as images
from tersor.grids.zipar.bench.quality import (
    RASTER,
    Plan,
    decodings,
    run_plan,
    sample,
    time_decodings,
)

ROWS = COLUMNS = 7


@pytest.fixture(scope="module")
def world():
    """Model, tokenizer and judge."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_classes": 10}
    model = LlamaGen(LlamaGenConfig(**sizes, grid_size=(ROWS, COLUMNS))).eval()
    tokenizer = PatchTokenizer.fit(torch.rand(20, 1, 28, 28), patch_size=4, codebook_size=12, seed=0, rounds=2)
    classifier = DigitClassifier().eval()
    features, _ = classifier.judge(torch.rand(50, 1, 28, 28))
    return model, tokenizer, (classifier, Reference.of(features, torch.arange(50) % 10))


CHOSEN = decodings(COLUMNS, [3, 7], [3], [2], [9], modes=("seed", "law"))


def test_decodings_are_ordered_and_checked() -> None:
    assert [each.name for each in CHOSEN] == [
        "raster", "window 7", "window 3", "adaptive 3", "eager 2", "speculative 9", "law speculative 9",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"windows \[8\] must be from 1 to the grid's 7"):
        decodings(COLUMNS, [8, 2], [], [])


def test_each_decoding_takes_its_passes(world) -> None:
    model = world[0]
    passes = {}
    for each in CHOSEN:
        drawn = each.draw(model, torch.arange(4), torch.Generator().manual_seed(0))
        assert drawn.ids.shape == (4, ROWS, COLUMNS)
        passes[each.name] = drawn.passes
    assert passes["raster"] == passes["window 7"] == 49
    assert passes["window 3"] == 2 * COLUMNS + (ROWS - 2) * 3
    assert passes["eager 2"] == COLUMNS + (ROWS - 1) * 2
    assert passes["speculative 9"] < 49 and passes["law speculative 9"] < 49
    assert passes["adaptive 3"] >= 2 * COLUMNS + (ROWS - 2) * 4


def test_the_full_window_draws_what_raster_draws(world) -> None:
    raster, full = (each.draw(world[0], torch.arange(3), torch.Generator().manual_seed(5))[0] for each in CHOSEN[:2])
    assert torch.equal(raster, full)


def test_samples_repeat_and_follow_their_seed(world) -> None:
    first, again, other = (sample(*world, CHOSEN[2], samples=30, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.distance != other.distance
    assert len(first.right) == 30
    assert first.passes == [29]


def test_distance_and_accuracy_judge_the_images_that_were_drawn(world, monkeypatch) -> None:
    """A judge that calls everything a 3 is right for one sample in ten."""
    model, tokenizer, (classifier, reference) = world
    monkeypatch.setattr(classifier, "judge", lambda drawn: (drawn.flatten(1)[:, :64], torch.full((len(drawn),), 3)))
    found = sample(model, tokenizer, (classifier, reference), CHOSEN[0], samples=40, seed=1)
    assert found.right == [int(index % 10 == 3) for index in range(40)]


def finished(plan: Plan, file: Path | None) -> Finished[Samples]:
    return Finished(file, plan, Samples.from_json)


def test_a_stopped_run_goes_on(world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = tmp_path / "progress"
    plan = Plan("a model", tuple(CHOSEN[:3]), 10, (1, 2))
    whole = dict(run_plan(plan, *world, finished(plan, None)))
    started = run_plan(plan, *world, finished(plan, progress))
    next(started)
    started.close()
    drawn = []
    monkeypatch.setattr(
        images, "sample", lambda *args, **options: drawn.append(args[3].name) or sample(*args, **options)
    )
    assert dict(run_plan(plan, *world, finished(plan, progress))) == whole
    assert drawn == ["window 7", "window 7", "window 3", "window 3"]
    with pytest.raises(ValueError, match="other settings"):
        finished(Plan("a model", tuple(CHOSEN), 10, (1, 2)), progress)


def test_speculative_images_are_rasters_by_every_figure_but_the_passes(world) -> None:
    raster, own, law = (sample(*world, CHOSEN[each], samples=30, seed=1, temperature=0.5) for each in (0, 5, 6))
    assert (own.right, own.distance, own.nats) == (raster.right, raster.distance, raster.nats)
    assert law.nats != raster.nats
    assert own.passes[0] < raster.passes[0] and own.fed[0] > raster.fed[0] == ROWS * COLUMNS - 1


def test_the_surprise_of_an_image_is_that_of_its_cells_one_by_one(world) -> None:
    model, labels = world[0], torch.arange(2)
    ids = torch.randint(12, (2, ROWS, COLUMNS), generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(2)
    with torch.no_grad():
        for cell, drawn in enumerate(ids.flatten(1).T):
            given = ids.flatten(1)[:, :cell] if cell else None
            law = (model(input_ids=given, class_labels=labels).logits[:, -1] / 2).softmax(-1)
            expected -= law[torch.arange(2), drawn].log()
    torch.testing.assert_close(images.surprise(model, labels, ids, 2.0), expected)


def test_images_are_compared_round_by_round(world) -> None:
    speed = time_decodings(world[0], [CHOSEN[0], CHOSEN[2], CHOSEN[5]], repeats=2, seed=0, batch=3)
    assert speed.same("speculative 9") == [1] * 9
    assert 0 in speed.same("window 3")
    assert speed.fed("raster") == 48 < speed.fed("speculative 9")
    assert speed.images_per_second(RASTER).value == pytest.approx(3 / speed.times.seconds(RASTER).value)


def test_speed_counts_the_passes_of_what_it_times(world) -> None:
    speed = time_decodings(world[0], CHOSEN[:3], repeats=3, seed=0)
    assert speed.mean_passes("window 3") == 29
    assert len(speed.passes[RASTER]) == 4  # the warm-up too
    rate = speed.images_per_second("window 3")
    assert rate.low <= rate.value <= rate.high
    assert speed.realized("window 3") == pytest.approx(speed.ratio("window 3").value * 29 / 49)

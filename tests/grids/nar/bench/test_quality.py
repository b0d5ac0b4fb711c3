"""The benchmark of NAR: what is compared, chosen and recorded; and captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nar_models import TEXT, model
from typer.testing import CliRunner

from tersor.bench.measure import Estimate, PairedTimes
from tersor.bench.runs import Finished
from tersor.cli import app
from tersor.grids.judge import ClipClassifier, DigitClassifier, Reference, load_judge, save_judge
from tersor.grids.llamagen import LlamaGen, LlamaGenConfig
from tersor.grids.nar.baselines import PARConfig, PARForImageGeneration
from tersor.grids.nar.bench.cli import EXCESS, caption_records, nar_records
from tersor.grids.nar.bench.quality import (
    CHOICES,
    NAR,
    RASTER,
    CaptionScores,
    Locked,
    Plan,
    Settings,
    Speed,
    choose,
    decodings,
    excess,
    run_plan,
    sample,
    score_captions,
    time_decodings,
)  # fmt: skip
from tersor.grids.nar.captions import LONGEST, WORDS, Captions, caption, slant, thickness
from tersor.grids.nar.pipeline import NARPipeline, WordFeatures
from tersor.grids.samples import Quality, Samples

SHAPE = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_classes": 5}


class Decoder:
    """Ids as grey squares of 7 by 7 pixels."""

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        return (ids / 19).repeat_interleave(7, -1).repeat_interleave(7, -2)[..., None, :, :]


@pytest.fixture
def chosen():
    torch.manual_seed(0)
    shape = {**SHAPE, "grid_size": (4, 4), "initializer_range": 0.3}
    compared = {
        "raster": LlamaGen(LlamaGenConfig(**shape)).eval(),
        "par4x": PARForImageGeneration(PARConfig(**shape)).eval(),
        "single-head": model((4, 4), head_layers=(1,)),
    }  # fmt: skip
    return decodings(model((4, 4)), compared)


@pytest.fixture
def judge():
    torch.manual_seed(0)
    classifier = DigitClassifier().eval()
    features, _ = classifier.judge(torch.rand(80, 1, 28, 28, generator=torch.Generator().manual_seed(1)))
    return classifier, Reference.of(features, torch.arange(80) % 10)


def test_every_decoding_takes_its_passes_and_draws(chosen) -> None:
    assert {each.name: each.passes for each in chosen} == {
        "NAR": 7, "raster": 16, "PAR-4X": 7, "single head": 7, "right head alone": 7, "head below alone": 7
    }  # fmt: skip
    for each in chosen:
        generators = (torch.Generator().manual_seed(2) for _ in "ab")
        drawn = [each.draw(torch.tensor([0, 1]), generator, Settings(guidance=1.5)) for generator in generators]
        assert drawn[0].shape == (2, 4, 4) and torch.equal(*drawn), each.name
    video = decodings(model((2, 2, 2)), {})
    assert [each.name for each in video] == ["NAR", "right head alone", "head below alone", "later head alone"]


def test_one_sided_mixing_shares_the_weights(chosen) -> None:
    ours, right = chosen[0].model, chosen[4].model
    assert (ours.config.mixing, right.config.mixing) == ("mean", "right")
    assert ours.outputs[0].weight is right.outputs[0].weight
    labels, settings = torch.arange(5), Settings(temperature=0.5)
    one, other = (each.draw(labels, torch.Generator().manual_seed(0), settings) for each in (chosen[0], chosen[4]))
    assert not torch.equal(one, other)


def test_a_sample_is_a_pure_function_and_classes_take_turns(chosen, judge) -> None:
    found = [sample(chosen[0], Decoder(), judge, Settings(), samples=12, seed=seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    assert len(found[0].right) == 12 and found[0].passes == [7]


def test_settings_are_chosen_on_another_seed_and_runs_resume(chosen, judge, tmp_path, monkeypatch) -> None:
    asked = []
    import tersor.grids.nar.bench.quality as module

    def finished(plan):
        return Finished(tmp_path / "run.partial", plan, Samples.from_json)

    def counted(each, tokenizer, judged, settings, *, samples, seed):
        asked.append((each.name, str(settings), samples, seed))
        return Samples([1, 0], 10.0 - settings.guidance - settings.temperature, 1.0, [each.passes])

    monkeypatch.setattr(module, "sample", counted)
    plan = Plan("m", tuple(each.name for each in chosen), 2, (1, 2), 3)
    found = run_plan(plan, chosen, Decoder(), judge, finished(plan))
    results = {name: (settings, quality) for name, settings, quality in found}
    best = Settings(temperature=1.0, guidance=1.5)
    assert {name: settings for name, (settings, _) in results.items()} == dict.fromkeys(plan.decodings, best)
    # Each model of its own has all choices; one-sided mixing takes NAR's.
    assert len(asked) == 4 * len(CHOICES) + len(chosen) * 2
    assert {seed for _, _, samples, seed in asked if samples == 3} == {0}
    assert {seed for _, _, samples, seed in asked if samples == 2} == {1, 2}
    again = len(asked)
    list(run_plan(plan, chosen, Decoder(), judge, finished(plan)))
    assert len(asked) == again, "what is done is not drawn again"
    with pytest.raises(ValueError, match="other settings"):
        finished(Plan("m", plan.decodings, 5, (1, 2), 3))


def test_the_settings_are_those_of_the_smallest_distance() -> None:
    done = {f"w/{each}": Samples([1], float(index != 3), float(index != 5), [1]) for index, each in enumerate(CHOICES)}
    assert choose(done, "w") == CHOICES[3]


def quality(*distances: float) -> Quality:
    return Quality([Samples([1, 0, 1, 1], distance, 2 * distance, [7]) for distance in distances])


def test_the_excess_is_the_ratio_above_the_floor() -> None:
    found = excess(quality(5.0, 7.0), quality(4.0, 5.0), 3.0)
    assert found.value == pytest.approx((2 + 4) / (1 + 2)) and found.low == found.high == pytest.approx(2)


def test_the_excess_has_the_interval_of_its_linear_part() -> None:
    """Against draws of the means: a ratio of normal variables whose lower one is far from zero."""
    ours, theirs, floor = np.array([9.0, 9.8, 10.1]), np.array([7.9, 8.1, 8.3]), 4.0
    found = excess(quality(*ours), quality(*theirs), floor)
    assert found.value == pytest.approx((ours.mean() - floor) / (theirs.mean() - floor))
    covariance = np.cov(ours, theirs) / 3
    above, below = np.random.default_rng(0).multivariate_normal((ours.mean(), theirs.mean()), covariance, 100_000).T
    spread = ((above - floor) / (below - floor)).std()
    assert (found.high - found.low) / 2 == pytest.approx(4.303 * spread, rel=0.05), "Student's t of three seeds"


def test_records_say_what_was_measured() -> None:
    found = {name: (Settings(guidance=1.5), quality(5.0, 7.0)) for name in (NAR, RASTER)}
    times = PairedTimes({NAR: (0.1, 0.1, 0.1), RASTER: (0.4, 0.4, 0.4)})
    speed = Speed(8, {NAR: 7, RASTER: 16}, times)
    floors = {"real": [1.0, 1.0], "reconstructed": [2.0, 2.0], "images": 30}
    facts = Locked(floors, {NAR: 0.5, RASTER: 0.25}, held_out=20)
    records = {
        (record.item, record.quantity): record
        for record in nar_records("m", found, [speed], facts=facts, device="cpu", command="c")
    }
    loss = records["NAR: real samples", "held-out loss"]
    assert (loss.measured, loss.baseline, loss.n) == (0.5, 0.25, 20)
    assert records["NAR: samples", "guidance"].measured == 1.5
    assert records["NAR: samples", EXCESS].measured == pytest.approx(1)
    assert records["NAR: samples", "class accuracy"].measured == 0.75
    assert records["NAR: samples", "Fréchet joint distance"].measured == 12
    assert records["reconstructed samples: floor", "Fréchet distance"].measured == 2
    assert records["raster: batch 8", "speed-up of NAR"].measured == pytest.approx(4)
    assert records["raster: batch 8", "share of the pass ratio"].measured == pytest.approx(4 * 7 / 16)
    assert records["NAR: batch 8", "samples per second"].measured == pytest.approx(80)
    scores = CaptionScores({"digit": [1, 0]})
    (record,) = caption_records("m", Settings(), scores, CaptionScores({"digit": [0, 0]}), command="c")
    assert (record.measured, record.baseline, record.n) == (0.5, 0.0, 2)


def test_decodings_are_timed_in_turns(chosen) -> None:
    speed = time_decodings(chosen, batch=2, repeats=2, seed=0)
    assert set(speed.times.samples) == {"NAR", "raster", "PAR-4X"}
    assert speed.over(RASTER).value > 0 and speed.realized("PAR-4X") == speed.over("PAR-4X").value
    assert speed.rate(NAR).value == pytest.approx(2 / speed.times.seconds(NAR).value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "1,x"], "whole numbers"), (["--batches", "0"], "whole numbers"),
        (["--model", "tiny-lm"], "one of"),
        (["--samples", "1"], "at least 2"), (["--validation", "1"], "at least 2"), (["--seeds", "0"], "at least 1"),
        (["--samples", "0", "--batches", ""], "nothing to measure"), (["--device", "abacus"], "no torch device"),
        (["--model", "tiny-nar-text", "--device", "meta"], "not for captions"),
        (["--model", "tiny-nar-text", "--samples", "0"], "nothing to measure"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, ["bench", "nar", *arguments], catch_exceptions=False)


def bar(width: float, lean: float, size: int = 28) -> torch.Tensor:
    """An upright stroke of some width, that moves ``lean`` to the right for each pixel that it rises."""
    y, x = torch.meshgrid(torch.arange(size) - 13.5, torch.arange(size) - 13.5, indexing="ij")
    ink = (width / 2 + 0.5 - (x + lean * y).abs()).clamp(0, 1) * (y.abs() <= 9)
    return ink[None, None]


def test_thickness_and_slant_are_measured() -> None:
    assert slant(bar(3, 0.25)).item() == pytest.approx(0.25, abs=0.02)
    assert slant(bar(3, -0.4)).item() == pytest.approx(-0.4, abs=0.02)
    assert thickness(bar(2, 0)) < thickness(bar(3, 0)) < thickness(bar(5, 0))
    shifted = bar(3, 0.25).roll((3, -2), (-2, -1))
    torch.testing.assert_close(slant(shifted), slant(bar(3, 0.25)))
    blank = torch.zeros(1, 1, 28, 28)
    assert slant(blank).item() == 0 and thickness(blank).item() == 0


def test_captions_come_back_from_pictures(tmp_path) -> None:
    images = torch.cat([bar(width, lean) for width in (2, 3, 5) for lean in (-0.3, 0.0, 0.3)])
    captions = Captions.fit(images)
    strokes, sides = captions.classes(images)
    assert strokes.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and sides.tolist() == [0, 1, 2] * 3
    captions.save(tmp_path)
    assert Captions.load(tmp_path) == captions
    with pytest.raises(ValueError, match="no captions"):
        Captions.load(tmp_path / "other")
    assert caption(7, 2, 0) == "a thick seven slanted left" and caption(0, 1, None) == "a zero"
    longest = [caption(digit, 2, side).split() for digit in range(10) for side in range(3)]
    assert max(map(len, longest)) == LONGEST and {word for each in longest for word in each} < set(WORDS)


def test_captions_are_scored_by_what_is_seen(judge) -> None:
    of = model((4, 4), **{**TEXT, "condition_tokens": LONGEST, "caption_size": len(WORDS)})
    pipeline = NARPipeline(of, Decoder(), WordFeatures(WORDS, LONGEST))
    everything = Captions((-1.0, 1e9), (-1e9, 1e9))  # every picture is of medium thickness, and upright
    scores = score_captions(pipeline, judge[0], everything, Settings(), samples=60, seed=0)
    assert len(scores.right["digit"]) == 60 and sum(scores.right["stroke"]) == 0
    assert sum(scores.right["slant"]) == 20, "a third of the captions say upright"
    assert sum(scores.right["all"]) == 0


def test_a_judge_of_clips_comes_back_as_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = ClipClassifier().eval()
    clips = torch.rand(9, 8, 1, 28, 28)
    features, guesses = judge.judge(clips)
    assert features.shape == (9, 64) and guesses.shape == (9,) and judge.direction(features).shape == (9, 3)
    save_judge(tmp_path, judge, Reference.of(features, guesses))
    again, reference = load_judge(tmp_path)
    assert isinstance(again, ClipClassifier) and reference.joint.n == 9
    assert torch.equal(again.judge(clips)[0], features)
    assert not torch.equal(judge.judge(clips.flip(1))[0], features), "it sees the order of frames"


def test_the_demo_measures_images_clips_and_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    import tersor.grids.nar.demo as demo

    monkeypatch.setattr(demo, "SAMPLES", 4)
    monkeypatch.setattr(demo, "CLIP_SAMPLES", 4)
    monkeypatch.setattr(demo, "ROUNDS", 1)
    said: list[str] = []
    result = demo.run(said.append)
    records = {(record.model, record.quantity): record for record in result.records}
    assert records["ImageNet's grid", "forward passes"].measured == 31
    for name, others in (("tiny-nar", ("raster", "PAR-4X")), ("tiny-nar-video", ("raster",))):
        assert records[name, "class accuracy against raster"].n == 4
        for other in others:
            record = records[name, f"samples a second against {other}"]
            assert record.peer == {"raster": 196, "PAR-4X": 52}[other] / {"tiny-nar": 27, "tiny-nar-video": 16}[name]
    assert records["tiny-nar-text", "all three as asked"].verdict in ("holds", "fails")
    assert len(result.section.figures) == 2 and any("captions" in each for each in said)


def test_the_demo_judges_by_the_numbers() -> None:
    from tersor.grids.nar.demo import judge_loss

    def estimate(value: float, half: float) -> Estimate:
        return Estimate(value, value - half, value + half, "95% bootstrap")

    assert judge_loss(estimate(-2, 1), None) == "holds"
    assert judge_loss(estimate(-2, 1), -1.5) == "holds"
    assert judge_loss(estimate(-2, 1), -0.5) == "partly", "PAR loses less"
    assert judge_loss(estimate(-5, 3), None) == "partly" and judge_loss(estimate(-9, 3), None) == "fails"

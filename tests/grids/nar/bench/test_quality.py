"""The benchmark of NAR: what is compared, chosen and recorded; and captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nar_models import TEXT, model

from tersor.bench.runs import Finished
from tersor.grids.judge import DigitClassifier, Reference
from tersor.grids.llamagen import LlamaGen, LlamaGenConfig
from tersor.grids.nar.baselines import PARConfig, PARForImageGeneration
from tersor.grids.nar.bench.quality import (
    CHOICES,
    NAR,
    RASTER,
    Plan,
    Settings,
    choose,
    decodings,
    excess,
    run_plan,
    sample,
    score_captions,
    time_decodings,
)  # fmt: skip
from tersor.grids.nar.captions import LONGEST, WORDS, Captions
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


def test_decodings_are_timed_in_turns(chosen) -> None:
    speed = time_decodings(chosen, batch=2, repeats=2, seed=0)
    assert set(speed.times.samples) == {"NAR", "raster", "PAR-4X"}
    assert speed.over(RASTER).value > 0 and speed.realized("PAR-4X") == speed.over("PAR-4X").value
    assert speed.rate(NAR).value == pytest.approx(2 / speed.times.seconds(NAR).value)


def test_captions_are_scored_by_what_is_seen(judge) -> None:
    of = model((4, 4), **{**TEXT, "condition_tokens": LONGEST, "caption_size": len(WORDS)})
    pipeline = NARPipeline(of, Decoder(), WordFeatures(WORDS, LONGEST))
    everything = Captions((-1.0, 1e9), (-1e9, 1e9))  # every picture is of medium thickness, and upright
    scores = score_captions(pipeline, judge[0], everything, Settings(), samples=60, seed=0)
    assert len(scores.right["digit"]) == 60 and sum(scores.right["stroke"]) == 0
    assert sum(scores.right["slant"]) == 20, "a third of the captions say upright"
    assert sum(scores.right["all"]) == 0

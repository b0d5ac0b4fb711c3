"""The look at a model before its layers are merged."""

from __future__ import annotations

import pytest
import torch
from tiny_models import alike, prompt

from tersor._compat import with_cache
from tersor.kv.depth.merging import MergeRule
from tersor.kv.depth.similarity import PairSimilarity, SimilarityReport, analyze_layer_similarity
from tersor.kv.engine.choices import pick
from tersor.kv.minicache import MiniCache


def test_the_report_finds_the_layers_that_are_alike() -> None:
    model = alike()
    report = analyze_layer_similarity(model, prompt(2, 60))
    errors = report.errors()
    assert set(errors) == {(0, 1), (1, 2), (2, 3)}
    assert max(errors[0, 1], errors[2, 3]) < 0.2 < errors[1, 2]
    assert report.pairs() == ((0, 1), (2, 3))
    assert "predicted error" in str(report)
    assert len(str(report).splitlines()) == 7


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_the_report_predicts_what_merging_finds(granularity: str) -> None:
    model = alike()
    settings = {"start_layer": 0, "bits": 16, "granularity": granularity, "min_tokens_to_compress": 8}
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[1, :20] = 0
    recipe = MiniCache(**settings)
    report = analyze_layer_similarity(model, prompt(2, 60), attention_mask=mask, rule=pick(MergeRule, recipe))
    cache = recipe.cache(model.config)
    with recipe.on(model), torch.no_grad():
        model(prompt(2, 60), attention_mask=mask, **with_cache(cache))
    for row in cache.summary()["pairs"]:
        layers = tuple(row["layers"])
        own = [each for each in report.rows if each.layers == layers]
        assert row["predicted_error"] == pytest.approx(report.errors()[layers], rel=1e-4)
        assert row["mean_cosine"] == pytest.approx(sum(each.mean_cosine for each in own) / 2, rel=1e-4)
        assert row["retained"] == pytest.approx(own[0].retained)


def report_of(errors: dict[tuple[int, int], float]) -> SimilarityReport:
    return SimilarityReport(
        tuple(
            PairSimilarity(pair, kind, 0.9, 0.9, 0.1, 0.05, error)  # type: ignore[arg-type]
            for pair, error in errors.items()
            for kind in ("keys", "values")
        )
    )


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        # The best pair of all stands in the way of two good ones.
        ({(0, 1): 0.3, (1, 2): 0.1, (2, 3): 0.3}, ((0, 1), (2, 3))),
        # Of equally many, those of least error.
        ({(0, 1): 0.3, (1, 2): 0.1}, ((1, 2),)),
        ({(0, 1): 0.2, (1, 2): 0.9, (2, 3): 0.4, (5, 6): 0.34}, ((0, 1), (5, 6))),
    ],
)
def test_pairs_are_as_many_as_fit_below_the_limit(errors: dict, expected: tuple) -> None:
    assert report_of(errors).pairs(0.35) == expected

"""The shape of ZipCache's claims on the trained model. Slow: the full figures are in docs/zipcache.md."""

from __future__ import annotations

import pytest

from tersor import zoo
from tersor.bench.contenders import FULL, pick
from tersor.bench.kv import Scores, pooled, score_recall
from tersor.bench.quantizers import score_layouts
from tersor.bench.tasks import TASKS, recall_samples

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

OURS = "ZipCache 4/2 r=0.6"
# Neither the demo nor the committed tables use this seed.
SEED = 31


@pytest.fixture(scope="module")
def tiny():
    return zoo.load("tiny-lm")


@pytest.fixture(scope="module")
def recall(tiny) -> dict[str, Scores]:
    model, tokenizer = tiny
    names = [
        OURS,
        "uniform 2-bit",
        "evict to 20% normalized",
        "evict to 20% accumulated",
        "4/0 40% normalized",
        "4/0 40% accumulated",
        "4/0 40% recent",
        "4/0 40% random",
    ]
    rivals = pick(names)
    return pooled(
        {
            task: score_recall(model, tokenizer.encode, recall_samples(task, n=80, prose=zoo.book(), seed=SEED), rivals)
            for task in TASKS
        }
    )


def test_mixed_precision_loses_almost_nothing(recall: dict[str, Scores]) -> None:
    difference = recall[OURS].against(recall[FULL])
    assert difference.high >= -0.005
    assert recall[OURS].ratio > 4


def test_it_beats_uniform_two_bits(recall: dict[str, Scores]) -> None:
    assert recall[OURS].against(recall["uniform 2-bit"]).value > 0


def test_quantizing_beats_evicting_by_tens_of_points(recall: dict[str, Scores]) -> None:
    for eviction in ("evict to 20% normalized", "evict to 20% accumulated"):
        assert recall[OURS].against(recall[eviction]).low > 0.10
        assert recall[eviction].ratio == pytest.approx(recall[OURS].ratio, rel=0.15)


def test_normalized_saliency_finds_what_matters(recall: dict[str, Scores]) -> None:
    for metric in ("accumulated", "recent", "random"):
        assert recall["4/0 40% normalized"].against(recall[f"4/0 40% {metric}"]).value > 0.05


def test_the_quantizer_table(tiny) -> None:
    model, tokenizer = tiny
    scores = score_layouts(model, tokenizer.encode, zoo.book(), n=32, bits=4, seed=SEED)

    def added(stress: str, layout: str) -> float:
        return scores[stress][layout].against(scores[stress]["exact"]).value

    ours = "channelwise K + channel-separable V"
    for stress in ("outlier channels", "key shift", "key bias"):
        assert added(stress, "tokenwise") > 3 * added(stress, ours)
    assert added("outlier channels", "channelwise K + tokenwise V") > added("outlier channels", ours)

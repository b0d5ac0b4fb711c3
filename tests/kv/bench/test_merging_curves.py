"""The merging benchmark: curves start at the full cache, and longer layers change no output."""

from __future__ import annotations

import pytest
import torch

from tersor import zoo
from tersor.kv.bench.contenders import FULL
from tersor.kv.bench.merging_curves import (
    STACKED,
    WAYS,
    merging_contenders,
    stacked_contenders,
    with_longer_layers,
)
from tersor.kv.bench.recall import score_continuation, score_recall
from tersor.kv.bench.tasks import recall_samples
from tersor.kv.depth.pairs import PairedLayer

PAIRS = [(2, 3), (4, 5)]


@pytest.fixture(scope="module")
def model():
    return zoo.load_model("tiny-lm")


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_contenders_merge_the_deepest_pairs_first(model) -> None:
    rivals = merging_contenders(PAIRS)
    assert len(rivals) == 1 + 2 * len(WAYS)
    merged = [
        [layer.layer_idx for layer in rival.build(model.config).layers if isinstance(layer, PairedLayer)]
        for rival in rivals[1:]
    ]
    assert merged == [[4, 5]] * len(WAYS) + [[2, 3, 4, 5]] * len(WAYS)
    with pytest.raises(ValueError, match="pairs is empty"):
        merging_contenders([])


def test_every_pair_saves_more_and_a_lossless_merge_costs_nothing(model) -> None:
    short = {"n": 2, "prefix": 200, "continuation": 24}
    losses = score_continuation(model, encode, zoo.book(), merging_contenders(PAIRS), **short)
    samples = recall_samples("needle", n=2, prose=zoo.book(), seed=1, context_bytes=256)
    recalls = score_recall(model, encode, samples, merging_contenders(PAIRS))
    for scores in (losses, recalls):
        for way in WAYS:
            ratios = [scores[name].ratio for name in (FULL, f"{way}, 1 pairs", f"{way}, 2 pairs")]
            assert ratios == sorted(set(ratios))
    lossless = score_continuation(model, encode, zoo.book(), merging_contenders(PAIRS, gamma=1.0), **short)
    for count in (1, 2):
        merged = lossless[f"slerp, gamma 0.05, {count} pairs"]
        assert merged.values == pytest.approx(lossless[FULL].values, rel=1e-4)


def test_longer_layers_compute_the_same(model) -> None:
    longer = with_longer_layers(model, [3, 5])
    ids = torch.tensor([encode(zoo.book()[:200])])
    with torch.no_grad():
        one, other = model(ids), longer(ids)
    assert torch.equal(one.logits, other.logits)
    keys = [out.past_key_values.layers[3].keys for out in (one, other)]
    assert torch.equal(2 * keys[0], keys[1])


def test_stacking_goes_from_large_to_small_and_is_smaller_than_zipcache_alone(model) -> None:
    losses = score_continuation(model, encode, zoo.book(), stacked_contenders(PAIRS), n=1, prefix=300, continuation=8)
    families = ("ZipCache 4/2", f"{STACKED} 4/2", "MiniCache")
    alone, both, merged = (
        [scores.ratio for name, scores in losses.items() if name.startswith(family)] for family in families
    )
    for ratios in (alone, both, merged):
        assert ratios == sorted(ratios)
    assert all(small > large for small, large in zip(both, alone, strict=True))

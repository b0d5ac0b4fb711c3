"""The shape of ZipVL's claims on tiny-vlm. Slow: the full figures are in docs/zipvl.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tersor import zoo
from tersor.bench.vlm import DENSE, Outcome, against, run_all, tasks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# Neither the demo nor the committed tables use this seed.
SEED = 31


@pytest.fixture(scope="module")
def results() -> dict[str, Outcome]:
    model = zoo.load_model("tiny-vlm").to(torch.bfloat16)
    return run_all(model, zoo.load_processor("tiny-vlm"), tasks(250, seed=SEED), taus=(0.975, 0.6), seed=SEED)


def test_the_default_tau_loses_less_than_half_a_point(results: dict[str, Outcome]) -> None:
    """With the first layer dense; with the paper's setting counting suffers on this model, see the docs."""
    ours = results["ZipVL evict 0.975, layer 0 dense"]
    assert against(ours, results[DENSE]).value >= -0.005
    assert ours.ratio < 0.9
    assert against(results["ZipVL evict 0.6, layer 0 dense"], results[DENSE]).value >= -0.02


def test_choosing_beats_random_by_far(results: dict[str, Outcome]) -> None:
    ours = results["ZipVL evict 0.6"]
    assert ours.ratio <= 0.5
    assert against(ours, results["random 0.6"]).low > 0.2


def test_storing_keeps_what_another_question_needs(results: dict[str, Outcome]) -> None:
    for tau in ("0.975", "0.6"):
        stored, evicted = results[f"ZipVL quantize {tau}"], results[f"ZipVL evict {tau}"]
        assert stored.dense_bytes / stored.kv_bytes >= 2
        assert against(stored, evicted).value >= 0
        assert against(stored, evicted, turn="second").value >= 0


def test_the_ratio_depends_on_layer_and_question(results: dict[str, Outcome]) -> None:
    ours = results["ZipVL evict 0.6"]
    shares = ours.layer_ratios()
    assert max(shares) > 1.2 * min(shares)
    by_kind = {
        kind: np.mean([r for r, own in zip(ours.ratios, ours.kinds, strict=True) if own == kind])
        for kind in ("color", "count")
    }
    assert by_kind["count"] > by_kind["color"]

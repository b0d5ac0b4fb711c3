"""The tau that keeps a wanted share of the tokens."""

from __future__ import annotations

import pytest
import torch
from tiny_models import model, prompt

from tersor.kv.zipvl import ZipVL


def test_a_ratio_can_be_asked_for() -> None:
    net = model("llama")
    samples = [{"input_ids": prompt(1, 80, seed=i)} for i in range(3)]
    recipe = ZipVL.for_ratio(net, samples, 0.5, min_tokens=0, policy="quantize")
    assert recipe.policy == "quantize"
    ratios = []
    for sample in samples:
        with recipe.on(net) as session, torch.no_grad():
            net(**sample)
        ratios.append(session.stats.token_ratio)
    assert sum(ratios) / 3 == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="no tau keeps 20%"):
        ZipVL.for_ratio(net, samples, 0.2, min_tokens=100)
    for wrong in ([], samples):
        with pytest.raises(ValueError, match="it takes at least one"):
            ZipVL.for_ratio(net, wrong, 0.5 if not wrong else 1.5)

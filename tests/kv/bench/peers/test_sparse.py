"""Other sparse prefills keep what they are told."""

from __future__ import annotations

import pytest
import torch
from tiny_models import IMAGE, build, model, prompt, question

from tersor.kv.bench.peers.sparse import fastv, fixed_share, random_share


def test_baselines_keep_what_they_are_told() -> None:
    net = model("qwen2_5_vl")
    inputs = question(net)
    tokens, visual = inputs["input_ids"].shape[1], int((inputs["input_ids"] == IMAGE).sum())

    def stats(method):
        with method.on(net) as session, torch.no_grad():
            net(**inputs)
        return session.stats

    for build_method in (fixed_share, random_share):
        assert stats(build_method(0.4, min_tokens=0)).per_layer == pytest.approx((round(0.4 * tokens) / tokens,) * 2)
        own = stats(build_method([1.0, 0.5], min_tokens=0))
        assert own.per_layer == pytest.approx((1.0, 0.5))
        assert tokens - 1 in own.kept[1][0].tolist()
    draws = [stats(random_share(0.4, min_tokens=0, seed=seed)).kept[0][0].tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    own = stats(fastv(0.25, dense_layers=1, min_tokens=0))
    assert own.per_layer[0] == 1.0
    assert own.visual_per_layer[1] == pytest.approx(round(0.25 * visual) / visual)


def test_fastv_chooses_once() -> None:
    net = build("llama", sharpness=2.0)
    chosen = []
    with fastv(0.3, dense_layers=0, min_tokens=0, visual_only=False).on(net) as session, torch.no_grad():
        net(prompt(1, 60))
        chosen = [own[0].tolist() for own in session.stats.kept]
        assert session.stats.physical_lengths == (len(chosen[0]),) * 2
    assert chosen[0] == chosen[1]
    with fixed_share(0.3, min_tokens=0).on(net) as session, torch.no_grad():
        net(prompt(1, 60))
        assert session.stats.kept[0][0].tolist() != session.stats.kept[1][0].tolist()

"""The figures of a sparse prefill."""

from __future__ import annotations

import pytest
import torch
from tiny_models import model, prompt

from tersor import ZipCache
from tersor.bench.measure import storage_bytes
from tersor.kv.zipvl import ZipVL


def test_stats_count_what_is_there() -> None:
    net = model("llama")
    with ZipVL(tau=0.8, min_tokens=0, skip_layers=(1,)).on(net) as session, torch.no_grad():
        net.generate(prompt(2, 60), max_new_tokens=5, do_sample=False)
        stats = session.stats
    first, second = (len(own) / 60 for own in stats.kept[0])
    assert stats.tokens == (60, 60)
    assert stats.per_layer == pytest.approx(((first + second) / 2, 1.0))
    assert stats.per_row == pytest.approx(((first + 1) / 2, (second + 1) / 2))
    mean = (first + second + 2) / 4
    assert stats.token_ratio == pytest.approx(mean)
    assert stats.attn_flops_reduction == pytest.approx(1 - mean**2)
    assert stats.attn_flops_reduction_exact == pytest.approx(1 - (first**2 + second**2 + 2) / 4)
    assert stats.attn_flops_reduction >= stats.attn_flops_reduction_exact
    assert stats.visual_ratio is None
    layers = session.cache.layers
    assert stats.kv_bytes == storage_bytes([layers[0].owned(), layers[1].keys, layers[1].values])
    assert stats.kv_dense_bytes == 2 * 2 * 2 * 2 * 64 * 2 * 8
    assert stats.physical_lengths == (max(map(len, stats.kept[0])) + 4, 64)
    assert stats.mass_per_layer[1] == 1.0
    assert 0.5 < stats.mass_per_layer[0] < 1.0
    assert stats.skipped_reason is None
    assert set(stats.to_dict()) == {name for name in stats.__dataclass_fields__ if name != "kept"}


def test_stats_say_why_nothing_was_left_out_and_when_there_are_none() -> None:
    net = model("llama")
    with ZipVL().on(net) as session:
        with pytest.raises(ValueError, match="run the model first"):
            _ = session.stats
        net.generate(prompt(1, 40), max_new_tokens=2)
        assert session.stats.skipped_reason == "short"
        assert session.stats.token_ratio == 1.0
    with ZipCache().on(net) as session, pytest.raises(ValueError, match="zipcache reads prompts densely"):
        _ = session.stats
    with ZipVL(min_tokens=0, tau=0.7, query_mode="compute").on(net) as session, torch.no_grad():
        net(prompt(1, 60))
        assert session.stats.attn_flops_reduction == pytest.approx(1 - session.stats.token_ratio)

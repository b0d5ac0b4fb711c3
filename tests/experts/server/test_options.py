"""A server with a cache plan: one of the base's layers answers, another is refused before anybody asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersor import CachePlan, ZipCache
from tersor.experts.server.options import ServeOptions, running
from tersor.experts.sources import load_model


def options(bank: Path, folder: Path, layers: int) -> ServeOptions:
    file = folder / f"{layers}.json"
    file.write_text(CachePlan(recipes=(ZipCache(saliency_ratio=1.0),), layers=(0,) * layers).to_json())
    return ServeOptions(bank=bank, base=str(bank.parent / "base"), router="none", cache=str(file))


def test_a_plan_must_be_of_the_bases_layers(bank: Path, tmp_path: Path) -> None:
    layers = load_model(str(bank.parent / "base")).config.num_hidden_layers
    with running(options(bank, tmp_path, layers)) as models:
        assert models is not None
    with (
        pytest.raises(ValueError, match=rf"for {layers + 1} compressed layers, this model \(.*\) has {layers}"),
        running(options(bank, tmp_path, layers + 1)),
    ):
        pass

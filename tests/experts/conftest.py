"""Three packed experts of a small base, merged and on a host."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import build
from tuned_models import NAMES, tuned

from tersor.experts.compress import compress_expert
from tersor.experts.config import (
    DeltaConfig,
)
from tersor.experts.delta import ExpertDelta
from tersor.experts.host import ExpertHost, merge_expert


@pytest.fixture(scope="module")
def deltas() -> dict[str, ExpertDelta]:
    base = build("llama")
    return {
        name: compress_expert(base, tuned(base, seed), DeltaConfig(bits=bits, grid=grid, num_salient=2))
        for seed, (name, bits, grid) in enumerate(zip(NAMES, (2, 1, 4), ("signed", "signed", "midrise"), strict=True))
    }


@pytest.fixture(scope="module")
def merged(deltas: dict[str, ExpertDelta]) -> dict[str | None, Any]:
    base = build("llama")
    return {None: base} | {name: merge_expert(base, delta) for name, delta in deltas.items()}


@pytest.fixture
def host(deltas: dict[str, ExpertDelta]) -> ExpertHost:
    host = ExpertHost(build("llama"))
    for name, delta in deltas.items():
        host.load_expert(name, delta)
    return host


@pytest.fixture(scope="module")
def base() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def expert(base: Any) -> Any:
    return tuned(base, 1)

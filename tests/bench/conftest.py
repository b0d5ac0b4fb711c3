from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tersor.bench.records import Record


@pytest.fixture
def make_record() -> Callable[..., Record]:
    """Build a plausible record; keywords replace fields."""

    def make(**changes: Any) -> Record:
        fields: dict[str, Any] = {
            "system": "zipcache",
            "item": "mixed 4/2 bits, 60 % salient",
            "quantity": "cache compression",
            "unit": "x",
            "claim": 4.98,
            "claim_source": "Table 3",
            "measured": 4.61,
            "low": 4.58,
            "high": 4.63,
            "interval": "95% bootstrap",
            "baseline": 1.0,
            "peer": 3.2,
            "peer_name": "uniform 4-bit",
            "n": 40,
            "seed": 0,
            "model": "tiny-lm",
            "shapes": "trained; 8 layers, hidden 256",
            "versions": {"tersor": "0.1.0", "torch": "2.13.0"},
            "machine": {"cpu": "Imaginary CPU", "cores": 2, "threads": 1, "os": "Linux x86_64", "gpu": None},
            "command": "tersor demo --only zipcache --json",
            "verdict": "holds",
        }
        return Record(**(fields | changes))

    return make

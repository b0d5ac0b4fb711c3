"""ZipAR's settings as data."""

from __future__ import annotations

import json

import pytest

from tersor.grids.zipar.config import ZipARConfig


def test_settings_survive_json() -> None:
    for config in (ZipARConfig(), ZipARConfig(window_size=7, adaptive=True, row_start="eager")):
        assert ZipARConfig.from_json(config.to_json()) == config
    assert json.loads(ZipARConfig().to_json()) == {
        "adaptive": False,
        "row_start": "auto",
        "window_size": "balanced",
    }
    with pytest.raises(ValueError, match=r"no settings \['windows'\]"):
        ZipARConfig.from_json('{"windows": 3}')
    with pytest.raises(AttributeError):
        ZipARConfig().window_size = 3

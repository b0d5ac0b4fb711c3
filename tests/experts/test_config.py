"""Settings: what is refused, and the round trip through JSON."""

from __future__ import annotations

import pytest

from tersor.experts.config import DeltaConfig, DeltaFormatError

BAD = {
    "bits": 5,
    "grid": "round",
    "num_salient": -1,
    "selection": "best",
    "selection_rounds": 0,
    "step_init": "max",
    "distill": "logits",
    "distill_steps": 1.5,
    "distill_rate": 1.0,
    "step_dtype": "bfloat16",
    "salient_dtype": "float8",
}


@pytest.mark.parametrize("name", BAD)
def test_settings_out_of_range(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        DeltaConfig(**{name: BAD[name]})


def test_settings_round_trip_and_counts() -> None:
    config = DeltaConfig(bits=4, num_salient={"q_proj": 0.1, "o_proj": 3}, full_modules=("gate",))
    assert DeltaConfig.from_dict(config.to_dict()) == config
    assert [config.salient_of(f"layers.0.{name}", 95) for name in ("q_proj", "o_proj", "up_proj")] == [10, 3, 0]
    assert DeltaConfig(num_salient=500).salient_of("q", 96) == 96
    for wrong in (1.5, -0.1):
        with pytest.raises(ValueError, match="num_salient"):
            DeltaConfig(num_salient=wrong)
    for wrong in ("eight", True):
        with pytest.raises(TypeError, match="num_salient"):
            DeltaConfig(num_salient=wrong)
    with pytest.raises(DeltaFormatError, match="fields"):
        DeltaConfig.from_dict({"bits": 2})
    with pytest.raises(DeltaFormatError, match="bits=7"):
        DeltaConfig.from_dict({**config.to_dict(), "bits": 7})
    with pytest.raises(ValueError, match="bits"):
        DeltaConfig(bits=2.0)

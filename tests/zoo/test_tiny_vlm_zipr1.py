"""tiny-vlm-zipr1 is what its card says: as right as tiny-vlm from half of the tokens, and its recipe still makes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tersor import zoo
from tersor.kv.bench.tiles import samples
from tersor.rl.bench.outcome import ask

NAME, START = "tiny-vlm-zipr1", "tiny-vlm"


@pytest.fixture(scope="module")
def lock() -> dict:
    return json.loads((zoo.path(NAME) / "recipe.lock.json").read_text())


def test_it_answers_from_half_of_the_tokens_as_the_card_says(lock: dict) -> None:
    told, card = lock["scores"], zoo.card(NAME)
    assert told[NAME]["right"]["n"] >= 600
    assert told[NAME]["right"]["share"] >= told[START]["right"]["share"] - 0.01
    assert told[NAME]["ratio"] <= 0.5 * told[START]["ratio"] and told[NAME]["relevant"] > told[START]["relevant"]
    assert told[f"{NAME}, dense"]["right"]["share"] >= told[f"{START}, dense"]["right"]["share"] - 0.02
    assert told[f"{NAME}, random tokens"]["right"]["share"] <= told[NAME]["right"]["share"] - 0.1
    assert f"{told[NAME]['ratio']:.1%}" in card and f"{told[START]['ratio']:.1%}" in card
    asked, processor = samples(4, seed=5), zoo.load_processor(NAME)
    found = {name: ask(zoo.load_model(name), processor, asked, 0.975) for name in (START, NAME)}
    assert found[NAME].ratio < 0.6 * found[START].ratio
    assert found[NAME].ratio == pytest.approx(told[NAME]["ratio"], abs=0.05)
    assert found[NAME].accuracy > 0.8


@pytest.mark.slow
def test_the_recipe_runs_resumes_and_repeats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tiny_vlm_zipr1

    weights = []
    for name in ("one", "two"):
        assert tiny_vlm_zipr1.main(["--out", str(tmp_path / name), "--smoke", "--threads", "1"]) == 0
        weights.append((tmp_path / name / NAME / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert tiny_vlm_zipr1.main(["--out", str(tmp_path / "one"), "--smoke", "--threads", "1", "--seed", "2"]) == 2
    assert "other settings" in capsys.readouterr().err

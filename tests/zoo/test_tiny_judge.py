"""tiny-judge is what its card says: at chance without its adapter, right with it, and only by what it sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from tersor import zoo
from tersor.opening.intjudge.demo import battles
from tersor.opening.intjudge.evaluation import blanked, decide
from tersor.opening.intjudge.world import PROMPT
from tersor.opening.judging.local import LocalJudge

NAME = "tiny-judge"


@pytest.fixture(scope="module")
def lock() -> dict:
    return json.loads((zoo.path(NAME) / "recipe.lock.json").read_text())


def test_it_is_a_real_qwen2_vl_of_a_few_megabytes() -> None:
    assert isinstance(zoo.load_model(NAME), Qwen2VLForConditionalGeneration)
    files = [each for each in zoo.path(NAME).rglob("*") if each.is_file()]
    assert sum(each.stat().st_size for each in files) < 8e6


def test_the_card_quotes_the_lock(lock: dict) -> None:
    card, after = zoo.card(NAME), lock["after"]["agreement"]["fdt"]
    for found in (after["average"], after["seen"], after["unseen"], lock["without_pictures"]):
        assert f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]" in card
    assert after["average"]["value"] >= 0.8 and after["unseen"]["value"] >= after["seen"]["value"] - 0.05
    assert lock["without_pictures"]["value"] <= after["average"]["value"] - 0.1
    assert after["n"][0] == lock["pairs"]["validation"]


def test_it_judges_battles_of_a_new_seed_by_their_pictures(tmp_path) -> None:
    pairs = battles(tmp_path, 24)
    judge = LocalJudge.from_pretrained(NAME, device="cpu", batch=8)
    assert judge.prompt == PROMPT and judge.settings["temperature"] == judge.temperature
    found, blind = decide(judge, pairs), decide(judge, blanked(pairs, tmp_path))
    assert found.agreement().value >= 0.8 > blind.agreement().value
    assert found.log_mass() > -1


def test_padding_sides_and_batches_give_the_same_scores(tmp_path) -> None:
    from tersor.opening.judging.base import Question

    pairs = battles(tmp_path, 6)
    questions = [Question(pair.battle, 0, pair.instance, pair.first, pair.second) for pair in pairs]
    judge = LocalJudge.from_pretrained(NAME, device="cpu", batch=2)
    other = LocalJudge(judge.model, judge.processor, PROMPT, name="other", padding="right")
    scores = judge.scores(questions)
    torch.testing.assert_close(other.scores(questions), scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat([judge.scores([each]) for each in questions]), scores, atol=1e-4, rtol=0)
    again = LocalJudge.from_pretrained(NAME, device="cpu")
    torch.testing.assert_close(again.scores(questions).softmax(-1), scores.softmax(-1), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_the_recipe_runs_and_resumes(tmp_path: Path) -> None:
    import tiny_judge

    for _ in range(2):
        assert tiny_judge.main(["--out", str(tmp_path), "--smoke", "--threads", "1"]) == 0
    assert (tmp_path / NAME / "adapter" / "adapter_model.safetensors").is_file()
    assert "Battles that it never saw" in (tmp_path / NAME / "CARD.md").read_text()

"""The four kinds of routers: what they read, answer and keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from router_models import EXPERTS, RULES, rules

from tersor.experts.router.config import RouterConfig
from tersor.experts.router.kinds import LLMScorer, RulesScorer, letter_tokens, load_backbone
from tersor.experts.router.routing import Router


def test_rules_must_fit() -> None:
    with pytest.raises(ValueError, match="rules are for"):
        RulesScorer({"math": ["x"]}, list(EXPERTS))
    with pytest.raises(ValueError, match="no regular expression"):
        RulesScorer({**RULES, "chat": ["("]}, list(EXPERTS))


def test_letters_are_scored_after_each_prompt(folders: dict[str, Path]) -> None:
    """One padded pass gives what each prompt alone gives, and only the letters' logits count."""
    model, tokenizer = load_backbone("llm", folders["llm"], 3)
    scorer = LLMScorer(model, tokenizer, EXPERTS, 160)
    texts = ["add 1 and 2", "x", "a much longer request than the others"]
    found = scorer.probabilities(texts)
    letters = tokenizer.encode("ABC")
    for row, text in zip(found, texts, strict=True):
        prompt = tokenizer.encode(
            "Who answers this best?\nA. math: word problems\nB. code: programs\nC. chat: talk\n"
            f"Request: {text}\nAnswer:"
        )
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(row, logits[letters].softmax(-1))


def test_a_long_request_loses_its_start(folders: dict[str, Path]) -> None:
    model, tokenizer = load_backbone("llm", folders["llm"], 3)
    scorer = LLMScorer(model, tokenizer, EXPERTS, 120)
    ids = scorer.prompt("start " + "x" * 200 + " the end", [2, 0, 1])
    text = tokenizer.decode(ids)
    assert len(ids) == 120
    assert "A. chat: talk\nB. math: word problems\nC. code: programs\n" in text
    assert text.endswith("the end\nAnswer:")
    assert "start" not in text
    with pytest.raises(ValueError, match="max_tokens=40"):
        LLMScorer(model, tokenizer, EXPERTS, 40).prompt("x", [0, 1, 2])


def test_too_many_experts_for_letters(tokenizer: Any) -> None:
    assert letter_tokens(tokenizer, 26) == tokenizer.encode("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    with pytest.raises(ValueError, match="27 different letters"):
        letter_tokens(tokenizer, 27)


def test_rules_come_back_from_disk(tmp_path: Path) -> None:
    rules(threshold=0.6, fallback="chat").save_pretrained(tmp_path)
    again = Router.from_pretrained(tmp_path)
    assert again.config == RouterConfig(kind="rules", experts=EXPERTS, threshold=0.6, fallback="chat")
    assert again.route("def sum").expert == "chat"


def test_a_classifier_of_other_labels(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="for 4 experts"):
        load_backbone("encoder", folders["encoder"], 4)

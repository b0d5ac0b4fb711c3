"""Routers are trained, and an interrupted training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from router_models import EXPERTS, REQUESTS, rules, trained

from tersor.experts.router.config import RouterConfig
from tersor.experts.router.evaluation import evaluate
from tersor.experts.router.kinds import load_backbone
from tersor.experts.router.routing import Router
from tersor.experts.router.training import read_requests, train_router


@pytest.mark.parametrize("kind", ["encoder", "embedding"])
def test_training_learns_what_is_easy_and_comes_back_from_disk(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    router = trained(folders, kind)
    assert evaluate(router, REQUESTS).accuracy.value >= 0.9
    router.save_pretrained(tmp_path / "router")
    texts = [request.text for request in REQUESTS]
    torch.testing.assert_close(
        Router.from_pretrained(tmp_path / "router").scorer.probabilities(texts), router.scorer.probabilities(texts)
    )


def test_an_embedding_router_leaves_its_model_alone(folders: dict[str, Path]) -> None:
    before = load_backbone("embedding", folders["embedding"], 3)[0].state_dict()
    after = trained(folders, "embedding", steps=5).scorer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_letters_carry_no_meaning(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In training the list is shuffled for each request, and the letter asked for is that of the expert's line."""
    asked: list[tuple[str, int]] = []

    def logits(model: Any, prompts: list[list[int]]) -> torch.Tensor:
        asked.extend((tokenizer.decode(ids), row) for row, ids in enumerate(prompts))
        return model(torch.tensor([[1]])).logits[0] * 0 + torch.zeros(len(prompts), model.config.vocab_size)

    def wanted(logits: torch.Tensor, letters: torch.Tensor) -> torch.Tensor:
        experts.extend(
            text.split(f"\n{tokenizer.decode([letter])}. ")[1].split(":")[0]
            for (text, _), letter in zip(asked[-len(letters) :], letters.tolist(), strict=True)
        )
        return logits.sum()

    tokenizer = load_backbone("llm", folders["llm"], 3)[1]
    experts: list[str] = []
    monkeypatch.setattr("tersor.experts.router.training.last_logits", logits)
    monkeypatch.setattr("tersor.experts.router.training.F.cross_entropy", wanted)
    trained(folders, "llm", steps=3)
    requests = [text.split("Request: ")[1].removesuffix("\nAnswer:") for text, _ in asked]
    assert experts == [next(r.expert for r in REQUESTS if r.text == text) for text in requests]
    assert len({text.split("\n")[1] for text, _ in asked}) == len(EXPERTS)  # each expert stands first at times


@pytest.mark.parametrize("kind", ["llm", "encoder", "embedding"])
def test_an_interrupted_training_goes_on(
    folders: dict[str, Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.experts.router.training.SAVE_EVERY", 2)
    state = tmp_path / "training.pt"

    def interrupt(doing: str) -> None:
        if doing.startswith("step 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(folders, kind, steps=6, state=state, on_progress=interrupt)
    assert state.is_file()
    said: list[str] = []
    resumed = trained(folders, kind, steps=6, state=state, on_progress=said.append)
    assert [text.split(":")[0] for text in said] == ["step 4 of 6", "step 6 of 6"]
    whole = trained(folders, kind, steps=6)
    texts = [request.text for request in REQUESTS]
    torch.testing.assert_close(resumed.scorer.probabilities(texts), whole.scorer.probabilities(texts))
    with pytest.raises(ValueError, match="another plan"):
        trained(folders, kind, steps=7, state=state)


def test_every_expert_needs_requests(folders: dict[str, Path]) -> None:
    config = RouterConfig(kind="llm", experts={**EXPERTS, "art": "pictures"}, max_tokens=200)
    with pytest.raises(ValueError, match="no requests for 'art'"):
        train_router(config, *load_backbone("llm", folders["llm"], 4), REQUESTS)
    with pytest.raises(ValueError, match="not trained"):
        train_router(rules().config, None, None, REQUESTS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "must be"),
        ('{"text": "x"}', "must be"),
        ('{"text": " ", "expert": "math"}', "no text"),
        ('{"text": "x", "expert": "art"}', "for 'art'"),
        ('{"text": "x", "expert": "math", "right": {"math": true}}', "of each"),
        ("", "no request"),
    ],
)
def test_lines_that_are_no_requests(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match=message):
        read_requests(file, list(EXPERTS))
    with pytest.raises(ValueError, match="no such file"):
        read_requests(tmp_path / "none", list(EXPERTS))

"""A training in one folder: killed and resumed it ends the same, and what is on the disk is what was trained."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from judges import PROMPT, parts_of, train, untrained
from peft import PeftModel
from safetensors.torch import load_file

from tersor._compat import older_checkpointing_names
from tersor._errors import TersorError
from tersor.opening.intjudge import trainer as trainers
from tersor.opening.intjudge.evaluation import decide
from tersor.opening.intjudge.pairs import Parts
from tersor.opening.judging.adapter import read_facts
from tersor.opening.judging.local import LocalJudge


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return parts_of(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, parts: Parts) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out, parts)
    return out


class KilledError(Exception):
    """Stands for a kill."""


def test_a_training_that_was_killed_and_resumed_gives_the_same_adapter(tmp_path, parts, whole, monkeypatch) -> None:
    at, done = random.Random().randint(1, 2), 0
    loss = trainers.IntJudgeTrainer.compute_loss

    def killed(self, *args, **options):
        nonlocal done
        done += 1
        if done == at + 1:
            raise KilledError
        return loss(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainers.IntJudgeTrainer, "compute_loss", killed)
        with pytest.raises(KilledError):
            train(tmp_path / "run", parts)
    assert (tmp_path / "run" / f"checkpoint-{at}").is_dir()
    told = train(tmp_path / "run", parts)
    own, other = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (tmp_path / "run", whole))
    assert own.keys() == other.keys() and any(value.abs().max() > 0 for name, value in own.items() if "lora_B" in name)
    for name, value in own.items():
        assert torch.equal(value, other[name]), (name, at)
    known = json.loads((whole / "report.json").read_text())
    assert {k: v for k, v in told.items() if k != "log"} == {k: v for k, v in known.items() if k != "log"}


def test_the_adapter_on_the_disk_gives_the_same_probabilities(parts, whole) -> None:
    model, processor = untrained()
    facts = read_facts(whole / "adapter")
    assert facts.prompt == PROMPT
    with older_checkpointing_names():
        again = PeftModel.from_pretrained(model, whole / "adapter")
    judge = LocalJudge(again, processor, facts.prompt, name="tiny", temperature=facts.temperature)
    found = decide(judge, parts.validation)
    rows = json.loads((whole / "measured.json").read_text())["done"]["after"]
    for (one, two), kept in zip(found.raw, rows, strict=True):
        for raw, known in zip((one, two), kept, strict=True):
            mine, its = (json.loads(each)["log_probabilities"] for each in (raw.text, known["text"]))
            assert list(mine.values()) == pytest.approx(list(its.values()), abs=1e-5)
            assert raw.label == known["label"]


def test_a_folder_of_another_training_is_refused(parts, whole) -> None:
    with pytest.raises(TersorError, match="belongs to another run"):
        train(whole, parts, learning_rate=1e-3)
    with pytest.raises(TersorError, match="belongs to another run"):
        train(whole, Parts(parts.training[:-1], parts.validation))


def test_the_card_says_what_it_is_worth_and_where_not_to_trust_it(whole, parts) -> None:
    card = (whole / "adapter" / "README.md").read_text(encoding="utf-8")
    told = json.loads((whole / "report.json").read_text())
    assert f"validated on {len(parts.validation)} decided battles" in " ".join(card.split())
    for words in ("FDT", "w/o tie", "answer shown first wins", "pictures grey", "Where not to trust it", "SHA-256"):
        assert words in card
    assert told["data"]["training"][:16] in card and f"temperature of {told['temperature']:.2f}" in card
    assert not list((whole / "adapter").glob("*.bin"))

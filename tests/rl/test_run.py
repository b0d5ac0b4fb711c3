"""A whole training in one folder: it reports, resumes as the same run, and is refused as another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from zipr1 import MODEL, config, data, policy

from tersor import zoo
from tersor.rl import run as runs
from tersor.rl.config import ZipR1Config
from tersor.rl.verifiers import exact_match


def go(folder: Path, settings: dict[str, Any] | None = None, *, seed: int = 0) -> dict[str, Any]:
    own = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "temperature": 1.0, **(settings or {})}
    return runs.run_zipr1(
        policy(folder), zoo.load_processor(MODEL), data(6), data(3, seed=9), exact_match,
        config(folder, seed=seed, **own), facts={"model": MODEL}, quiet=True,
    )  # fmt: skip


class Killed(Exception):
    """Stands for a run that is stopped."""


class KillAfter(TrainerCallback):
    """Stops a run once a checkpoint is whole."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise Killed


def test_a_run_reports_saves_and_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path, monkeypatch) -> None:
    whole = go(tmp_path / "a")
    out = tmp_path / "a" / "run"
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(whole))
    assert [row["tau"] for row in whole["after"]] == [0.5, 0.7, 0.9, 0.975, 1.0]
    assert "<svg" in (out / "report.html").read_text()
    card = (out / "model" / "README.md").read_text()
    assert ("tersor.ZipVL(tau=0.975, min_tokens=0).on(model)" in card and "Read densely" in card) or "meant for" in card

    live = runs._Live

    class Both(live, KillAfter): ...

    monkeypatch.setattr(runs, "_Live", Both)
    with pytest.raises(Killed):
        go(tmp_path / "b")
    monkeypatch.setattr(runs, "_Live", live)
    resumed = go(tmp_path / "b")

    def of(told: dict[str, Any], name: str) -> list[float]:
        return [row[name] for row in told["log"]]

    for name in ("token_ratio", "zipr1_reward", "loss", "kl", "soft_token_ratio"):
        assert of(resumed, name) == of(whole, name)
    first, second = (load_file(tmp_path / each / "run" / "model" / "model.safetensors") for each in "ab")
    assert all(torch.equal(first[name], weight) for name, weight in second.items())

    with pytest.raises(ValueError, match="belongs to another run"):
        go(tmp_path / "b", {"learning_rate": 5e-4})
    with pytest.raises(ValueError, match="belongs to another run"):
        go(tmp_path / "b", seed=1)


def test_the_literal_objective_says_what_to_expect_of_it(tmp_path: Path, capsys) -> None:
    go(tmp_path, {"objective": "literal", "max_steps": 1, "thresholds": [0.95, 0.96, 0.97, 0.975]})
    assert "expect the token ratio to stay" in capsys.readouterr().err


def test_a_plan_knows_what_changes_a_training(tmp_path: Path) -> None:
    def plan(**settings: Any) -> dict[str, Any]:
        return runs._plan(ZipR1Config(output_dir=str(tmp_path), per_device_train_batch_size=8, **settings))

    assert plan(save_steps=7) == plan()
    assert plan(beta=0.1) != plan() != plan(zipvl={"min_tokens": 0})

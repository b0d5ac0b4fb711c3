"""Runs of recipes: steps are counted and timed, states are written now and then, and go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import shared.run
import torch
from shared.run import Progress, Run, refused, set_rate
from torch import nn


def start(state: Path, seed: int = 1) -> Run[Progress]:
    model = nn.Linear(2, 1)
    return Run(state, "plan", seed, model, torch.optim.SGD(model.parameters(), lr=1.0), Progress())


def test_a_run_goes_on_with_its_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = start(tmp_path / "state.pt")
    assert run.advance(lambda: "loss") == "loss"
    run.note({"step": 1})
    assert capsys.readouterr().out == "{'step': 1}\n"
    run.save(now=True)
    again = start(tmp_path / "state.pt")
    assert again.progress == run.progress and again.progress.step == 1 and again.progress.seconds > 0
    assert torch.equal(again.model.weight, run.model.weight)
    with pytest.raises(ValueError, match="another plan or seed"):
        start(tmp_path / "state.pt", seed=2)


def test_states_are_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(tmp_path / "state.pt")
    run.save(now=False)
    assert not (tmp_path / "state.pt").exists()
    monkeypatch.setattr(shared.run, "SAVE_EVERY_S", -1.0)
    run.save(now=False)
    assert (tmp_path / "state.pt").exists()


def test_small_things(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    set_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]
    assert refused("tiny_lm", ValueError("no books")) == 2
    assert capsys.readouterr().err == "tiny_lm: no books\n"

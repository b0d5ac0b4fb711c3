"""A run that was stopped and goes on is the run that was not stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tersor.training.state import load_state, save_state


def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        loss = model(torch.full((1, 3), float(step))).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_model_and_optimizer_go_on_where_they_were(tmp_path: Path) -> None:
    file, plan = tmp_path / "state.pt", ({"steps": 6}, 1)
    whole = parts()
    train(*whole, range(6))
    first = parts()
    assert load_state(file, plan=plan, model=first[0], optimizer=first[1]) == {}
    train(*first, range(3))
    save_state(file, plan=plan, model=first[0], optimizer=first[1], progress={"step": 3, "rng": torch.arange(2)})
    second = parts()
    progress = load_state(file, plan=plan, model=second[0], optimizer=second[1])
    assert progress["step"] == 3 and progress["rng"].tolist() == [0, 1]
    train(*second, range(3, 6))
    for name, each in whole[0].state_dict().items():
        assert torch.equal(each, second[0].state_dict()[name])


def test_another_plan_or_seed_is_refused(tmp_path: Path) -> None:
    file, (model, optimizer) = tmp_path / "state.pt", parts()
    save_state(file, plan=("plan", 1), model=model, optimizer=optimizer, progress={})
    for other in (("plan", 2), ("other", 1)):
        with pytest.raises(ValueError, match="another plan or seed"):
            load_state(file, plan=other, model=model, optimizer=optimizer)


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, (model, optimizer) = tmp_path / "state.pt", parts()
    save_state(file, plan="p", model=model, optimizer=optimizer, progress={"step": 1})

    def cut(state: object, target: Path) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        save_state(file, plan="p", model=model, optimizer=optimizer, progress={"step": 2})
    assert load_state(file, plan="p", model=model, optimizer=optimizer) == {"step": 1}

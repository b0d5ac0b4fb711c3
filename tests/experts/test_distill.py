"""Distillation moves steps and nothing else, and never for the worse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tuned_models import IDS, logits

from tersor.experts.compress import compress_expert
from tersor.experts.config import DeltaConfig
from tersor.experts.distill import closed_form_step
from tersor.experts.host import merge_expert

pytestmark = [
    pytest.mark.filterwarnings("ignore:only .* calibration tokens"),
    pytest.mark.filterwarnings("ignore:no calibration data"),
]


def held_out_loss(base: Any, expert: Any, delta: Any) -> float:
    return float((logits(merge_expert(base, delta)) - logits(expert)).square().mean())


@pytest.mark.parametrize("grid", ["signed", "midrise"])
def test_distillation_helps_and_changes_steps_only(base: Any, expert: Any, grid: str) -> None:
    text = torch.randint(2, 190, (32, 32), generator=torch.Generator().manual_seed(5))
    plain = compress_expert(base, expert, DeltaConfig(grid=grid, step_init="lsq"), calibration=text)
    for kind in ("codes", "closed_form"):
        config = DeltaConfig(grid=grid, step_init="lsq", distill=kind, distill_steps=30)
        better = compress_expert(base, expert, config, calibration=text)
        assert held_out_loss(base, expert, better) < held_out_loss(base, expert, plain)
        changed = {
            name.rpartition(".")[2] for name, t in better.tensors.items() if not torch.equal(t, plain.tensors[name])
        }
        # On the mid-rise grid a salient channel's code stands for half a step, which its residual takes back.
        assert changed == ({"step"} if grid == "signed" else {"step", "salient_weight"})


def test_distillation_never_makes_it_worse(base: Any, expert: Any) -> None:
    wild = DeltaConfig(distill="codes", distill_rate=0.99, distill_steps=3)
    plain = compress_expert(base, expert, DeltaConfig(), calibration=IDS)
    delta = compress_expert(base, expert, wild, calibration=IDS)
    held = IDS[:1]  # a quarter of one batch, which the loss is checked on
    errors = [
        float((logits(merge_expert(base, d), held) - logits(expert, held)).square().mean()) for d in (plain, delta)
    ]
    assert errors[1] <= errors[0] * (1 + 1e-3)


def test_the_closed_form_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.randn(50, 12, generator=generator), torch.randn(5, 12, generator=generator)
    v = delta.sign() + 0.5
    step = closed_form_step(delta, v, x.T @ x, torch.ones(5))
    for row in range(5):
        solved = torch.linalg.lstsq((x @ v[row])[:, None], (x @ delta[row])[:, None]).solution
        assert float(step[row]) == pytest.approx(float(solved), rel=1e-4)
    assert torch.equal(closed_form_step(delta, torch.zeros_like(v), x.T @ x, torch.ones(5)), torch.ones(5))

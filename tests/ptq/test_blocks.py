"""A block never gets worse, and sees the end of its stage."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from rep_models import W4, images
from torch import nn

from tersor.ptq.blocks import block_loss
from tersor.ptq.calibration import quantize
from tersor.ptq.config import RepAPQConfig


def test_blocks_never_get_worse_and_the_original_stays(net) -> None:
    state = copy.deepcopy(net.state_dict())
    found = quantize(net, images(96), replace(W4, iterations=20))
    assert all(block.after <= block.before for block in found.blocks)
    assert any(block.after < 0.9 * block.before for block in found.blocks)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [block.name for block in found.blocks] == [
        "stem", "stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1", "stages.1.2", "head",
    ]  # fmt: skip


def test_the_end_of_the_stage_supervises_all_but_its_last_block(net) -> None:
    tail = net.stages[0][1]

    def gradient(config: RepAPQConfig, following: list[nn.Module]) -> torch.Tensor:
        block = nn.Conv2d(16, 16, 1, bias=False)
        with torch.no_grad():
            block.weight.copy_(torch.eye(16)[:, :, None, None] * 0.9)
        x = net.stem(images(4)).detach()
        block_loss(block, following, x, x, tail(x).detach(), config).backward()
        return block.weight.grad

    with_stage, without = RepAPQConfig(), RepAPQConfig(across_block=False)
    assert not torch.allclose(gradient(with_stage, [tail]), gradient(without, [tail]))
    assert torch.equal(gradient(with_stage, []), gradient(without, []))
    assert not torch.allclose(gradient(without, []), gradient(replace(without, loss="mse"), []))

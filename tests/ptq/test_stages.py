"""Chains of stages: found by name or given, and refused where the model computes something else."""

from __future__ import annotations

import pytest
import torch
from rep_models import images, small
from torch import Tensor, nn

from tersor.ptq.stages import find_stages


class Shortcut(nn.Module):
    """Two stages, and a sum around the second that no chain has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tail = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.tail(x)


def test_stem_stages_and_head_are_a_stage_each() -> None:
    net = small().eval()
    chain = find_stages(net, images(2))
    assert [stage.name for stage in chain][:3] == ["stem", "stages.0", "stages.1"]
    assert [len(stage.blocks) for stage in chain][1:3] == [2, 3]
    assert chain[1].blocks == ("stages.0.0", "stages.0.1")
    x = images(2)
    with torch.no_grad():
        exact = net(x)
        for stage in chain:
            for block in stage.blocks:
                x = net.get_submodule(block)(x)
    torch.testing.assert_close(x, exact)


def test_children_that_do_nothing_are_no_stage() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.Conv2d(4, 2, 1)).eval()
    assert [stage.name for stage in find_stages(model, images(1))] == ["0", "2"]


def test_stages_may_be_given() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    chain = find_stages(model, images(1), [["0", "1"], ["2"]])
    assert [stage.blocks for stage in chain] == [("0", "1"), ("2",)]


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        (None, "their output is another one"),
        ([["stem"]], "their output is another one"),
        ([["tail"], ["stem"], ["nothing"]], "has no attribute"),
    ],
)
def test_what_is_no_chain_is_refused_with_the_reason(stages: list[list[str]] | None, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"Shortcut is no chain of .*{reason}.*give stages="):
        find_stages(Shortcut().eval(), images(1), stages)


def test_shapes_that_do_not_follow_each_other_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)).eval()
    with pytest.raises(ValueError, match=r"no chain of 1, 0: .*channels"):
        find_stages(model, images(1), [["1"], ["0"]])

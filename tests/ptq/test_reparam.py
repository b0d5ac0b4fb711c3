"""Merging: the same outputs in double precision, whatever the branches, and clear words where it cannot be."""

from __future__ import annotations

import copy

import pytest
import torch
from rep_models import images, small, unruly
from torch import nn

from tersor.ptq.networks import KINDS, BranchedConv
from tersor.ptq.reparam import Branch, merge, merge_branches


def randomized(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 1e-4, 2.0)
    return norm.eval()


@pytest.mark.parametrize(
    ("inner", "outer", "stride", "groups", "sizes", "identity"),
    [
        (6, 6, 1, 1, (3, 1), True),
        (6, 6, 1, 6, (3, 1, 3), True),
        (4, 8, 2, 2, (3, 1), False),
        (6, 6, 1, 3, (5, 3), True),
    ],
)
def test_one_convolution_computes_the_sum_of_the_branches(inner, outer, stride, groups, sizes, identity) -> None:
    torch.manual_seed(0)
    branches = [
        Branch(
            nn.Conv2d(inner, outer, size, stride, size // 2, groups=groups, bias=size == 1),
            randomized(nn.BatchNorm2d(outer)),
        )
        for size in sizes
    ]
    branches += [Branch(None, randomized(nn.BatchNorm2d(outer)))] if identity else []
    x = torch.randn(2, inner, 9, 7, dtype=torch.float64)
    summed = sum(branch.norm.double()(x if branch.conv is None else branch.conv.double()(x)) for branch in branches)
    merged = merge_branches(branches)(x)
    assert (merged - summed).abs().max() <= 1e-9 * summed.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_merged_and_the_original_left_alone(kind) -> None:
    net = unruly(kind)
    state = copy.deepcopy(net.state_dict())
    net.train()
    merged = merge(net, images(4))
    assert net.training and not merged.training
    # Eval mode on both sides: the norms' statistics must not move.
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.modules())
    assert merged.head.fc.weight.dtype == torch.float32
    exact, x = net.eval().double(), images(16, seed=2).double()
    assert (exact(x) - merged.double()(x)).abs().max() <= 1e-4 * exact(x).abs().max()
    kernels = [module.merged.weight.detach() for module in merged.modules() if isinstance(module, BranchedConv)]
    assert max(float(kernel.abs().max()) for kernel in kernels) > 5, "the huge entries that break plain quantizers"


def test_a_norm_that_is_left_after_a_convolution_goes_into_it() -> None:
    net = nn.Sequential(unruly().stem, nn.Conv2d(16, 8, 3, padding=1), randomized(nn.BatchNorm2d(8)), nn.ReLU()).eval()
    merged = merge(net, images(2))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.modules())
    torch.testing.assert_close(merged(images(2)), net(images(2)), rtol=1e-4, atol=1e-5)


class Older(nn.Module):
    """A block with the method that RepVGG's authors gave theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.block = BranchedConv(3, 4, kernels=(3, 1))

    def switch_to_deploy(self) -> None:
        self.block.replace_branches(merge_branches(self.block.branches()))

    def forward(self, x):
        return self.block(x)


def test_methods_of_other_libraries_are_called() -> None:
    merged = merge(nn.Sequential(Older().eval()), images(2))
    assert isinstance(merged[0].block.merged, nn.Conv2d)


class Merged(nn.Module):
    """A block that has been merged already."""

    def __init__(self) -> None:
        super().__init__()
        self.reparam_conv = nn.Conv2d(3, 4, 3)

    def reparameterize(self) -> None:
        pass

    def forward(self, x):
        return self.reparam_conv(x)


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no blocks with branches.*RepBlock"):
        merge(nn.Sequential(nn.Conv2d(3, 4, 3)), images(2))
    with pytest.raises(ValueError, match=r"one convolution already \(Merged\)"):
        merge(nn.Sequential(Merged()), images(2))
    with pytest.raises(ValueError, match=r"does not take images of \(5, 16, 16\)"):
        merge(unruly(), torch.zeros(2, 5, 16, 16))
    broken = unruly()
    with torch.no_grad():
        broken.head.fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        merge(broken, images(2))
    wrong = small()
    honest = BranchedConv.branches
    wrong.stem.branches = lambda: honest(wrong.stem)[:1]
    wrong.eval()
    with pytest.raises(ValueError, match="merging changed the outputs"):
        merge(wrong, images(2))


def test_branches_that_cannot_be_added_are_refused() -> None:
    one, two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1, stride=2)
    with pytest.raises(ValueError, match="stride, groups or channels"):
        merge_branches([Branch(one, None), Branch(two, None)])
    with pytest.raises(ValueError, match="identity branch"):
        merge_branches([Branch(one, None), Branch(None, nn.BatchNorm2d(4))])
    with pytest.raises(ValueError, match="needs a convolution"):
        merge_branches([Branch(None, nn.BatchNorm2d(4))])
    with pytest.raises(ValueError, match="no running statistics"):
        merge_branches([Branch(one, nn.BatchNorm2d(4, track_running_stats=False))])

"""What the inputs of linears look like, with and without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tuned_models import IDS

from tersor.experts.calibration import input_energy
from tersor.experts.compress import compress_expert, compress_linear
from tersor.experts.config import DeltaConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:only .* calibration tokens"),
    pytest.mark.filterwarnings("ignore:no calibration data"),
]


def test_padding_changes_nothing(base: Any, expert: Any) -> None:
    """Padding within a batch: its tokens, whatever they are, count for nothing."""
    names = list(compress_expert(base, expert, calibration=IDS).manifest.modules)
    plain, tokens = input_energy(expert, names, [(IDS, torch.ones_like(IDS))])
    wide = torch.cat([IDS, torch.full_like(IDS, 5)], dim=1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros_like(IDS)], dim=1)
    padded, counted = input_energy(expert, names, [(wide, mask)])
    assert tokens == counted == IDS.numel()
    for name in names:
        assert torch.allclose(plain[name], padded[name], rtol=1e-5)
        delta = expert.get_submodule(name).weight.detach() - base.get_submodule(name).weight.detach()
        one = compress_linear(delta, DeltaConfig(), plain[name], name=name)
        other = compress_linear(delta, DeltaConfig(), padded[name], name=name)
        assert one[0] == other[0]
        assert all(torch.equal(one[1][part], other[1][part]) for part in one[1])


def test_energies_are_those_of_the_inputs(expert: Any) -> None:
    seen = []
    name = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        handle = expert.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        expert(input_ids=IDS)
        handle.remove()
    found, _ = input_energy(expert, [name], [(IDS[:3], torch.ones_like(IDS[:3])), (IDS[3:], torch.ones_like(IDS[3:]))])
    assert torch.allclose(found[name], seen[0].double().square().sum((0, 1)), rtol=1e-5)
    assert not expert.get_submodule(name)._forward_pre_hooks

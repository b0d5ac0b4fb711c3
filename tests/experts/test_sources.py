"""Models and folders as sources, and pairs that do not belong together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build
from torch import nn
from tuned_models import IDS, tuned

from tersor.experts.compress import compress_expert
from tersor.experts.config import ConfigMismatchError, DeltaConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:only .* calibration tokens"),
    pytest.mark.filterwarnings("ignore:no calibration data"),
]


def test_models_that_do_not_belong_together(base: Any) -> None:
    other = build("mistral")
    with pytest.raises(ConfigMismatchError, match="differ in"):
        compress_expert(base, other)
    config = copy.deepcopy(base.config)
    config.intermediate_size = 64
    with pytest.raises(ConfigMismatchError, match="intermediate_size"):
        compress_expert(base, type(base)(config))
    broken = tuned(base, 1)
    with torch.no_grad():
        broken.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj\.weight .*NaN"):
        compress_expert(base, broken)
    with pytest.raises(ValueError, match="needs calibration"):
        compress_expert(base, base, DeltaConfig(distill="codes"))
    with pytest.raises(ValueError, match="list of decoder layers"):
        compress_expert(Plain(base.config), Plain(base.config))


class Plain(nn.Module):
    """A model without decoder layers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(4, 4)


def test_folders_give_what_models_give(base: Any, expert: Any, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    plain = compress_expert(base, expert, calibration=IDS)
    read = compress_expert(tmp_path / "base", tmp_path / "expert", calibration=IDS)
    assert read.manifest.base_fingerprint == plain.manifest.base_fingerprint
    assert all(torch.equal(t, read.tensors[name]) for name, t in plain.tensors.items())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors"):
        compress_expert(tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"no config\.json"):
        compress_expert(tmp_path / "base", tmp_path)
    half = tmp_path / "expert" / "model.safetensors"
    half.write_bytes(half.read_bytes()[:5000])
    with pytest.raises(ValueError, match="its header says"):
        compress_expert(tmp_path / "base", tmp_path / "expert")

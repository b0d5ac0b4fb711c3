"""The authors' checkpoints: every name and shape, or none."""

from __future__ import annotations

import pytest
import torch
from drag_models import branch, unet
from safetensors.torch import save_file

from tersor._errors import TersorError
from tersor.drag.controlnet import SpatioTemporalControlNetModel, accumulated
from tersor.drag.convert import convert_draganything

SHARED = ("down_block_types", "block_out_channels", "addition_time_embed_dim", "cross_attention_dim", "num_frames",
          "projection_class_embeddings_input_dim", "num_attention_heads", "conditioning_embedding_out_channels",
          "entity_embedding_out_channels")  # fmt: skip


@pytest.fixture(scope="module")
def own() -> SpatioTemporalControlNetModel:
    return branch(unet(), seed=5)


def sizes(own, *without: str) -> dict:
    return {name: own.config[name] for name in SHARED if name not in without}


def test_a_file_is_read_bit_for_bit_with_the_authors_factors(own, tmp_path) -> None:
    save_file(own.state_dict(), tmp_path / "a.safetensors")
    found = convert_draganything(tmp_path / "a.safetensors", **sizes(own))
    assert found.config.residual_multipliers == accumulated([2, 2]) and found.config.map_mode == "official"
    assert all(torch.equal(each, own.state_dict()[name]) for name, each in found.state_dict().items())
    found.save_pretrained(tmp_path / "saved")
    again = SpatioTemporalControlNetModel.from_pretrained(tmp_path / "saved")
    assert tuple(again.config.residual_multipliers) == accumulated([2, 2])
    folded = convert_draganything(tmp_path / "a.safetensors", fold_residual_accumulation=True, **sizes(own))
    assert folded.config.residual_multipliers is None
    for index, factor in enumerate(accumulated([2, 2])):
        for part in ("weight", "bias"):
            name = f"controlnet_down_blocks.{index}.{part}"
            assert torch.equal(folded.state_dict()[name], own.state_dict()[name] * factor)


def test_a_branch_of_one_map_is_one(own, tmp_path) -> None:
    weights = {name: each for name, each in own.state_dict().items() if "_feature" not in name}
    save_file(weights, tmp_path / "depth.safetensors")
    found = convert_draganything(tmp_path / "depth.safetensors", **sizes(own, "entity_embedding_out_channels"))
    assert found.state_dict().keys() == weights.keys()
    assert [*found.config.entity_embedding_out_channels] == []


def test_other_files_are_refused(own, tmp_path) -> None:
    weights = own.state_dict()
    for changed, message in (
        ({**weights, "extra": torch.ones(1)}, r"unknown \['extra'\]"),
        ({name: each for name, each in weights.items() if name != "conv_in.bias"}, r"missing \['conv_in.bias'\]"),
        ({**weights, "conv_in.bias": torch.ones(3)}, r"conv_in.bias: \(3,\), not \(32,\)"),
    ):
        save_file(changed, tmp_path / "a.safetensors")
        with pytest.raises(TersorError, match=message):
            convert_draganything(tmp_path / "a.safetensors", **sizes(own))
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(TersorError, match="cannot be read as safetensors"):
        convert_draganything(tmp_path / "a.safetensors")

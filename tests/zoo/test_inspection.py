"""Configurations against the weights that lie beside them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import variant

from tersor import zoo
from tersor._errors import TersorError
from tersor.zoo.inspection import check_config, check_finite, load_checked, read_shapes, refused


def write(folder: Path, config: dict[str, Any], **shapes: list[int]) -> Path:
    """A folder with this configuration, and weights of these shapes, all zero, in float32."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(torch.tensor(shape).prod())
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_checkpoint_of_the_zoo_passes() -> None:
    pipelines = {name for name in zoo.names() if (zoo.path(name) / "model_index.json").is_file()}
    assert pipelines == {"tiny-drag"}, "its test loads it"
    for name in {*zoo.names()} - pipelines:
        assert check_config(zoo.path(name))["architectures"]


def test_shapes_come_from_the_header(tmp_path: Path) -> None:
    write(tmp_path, {}, a=[3, 4], b=[5])
    assert read_shapes(tmp_path / "model.safetensors") == {"a": [3, 4], "b": [5]}


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 5},
        {"hidden_size": 8, "num_attention_heads": 3, "head_dim": 4},
        {"num_key_value_heads": None, "rope_scaling": None, "text_config": {"hidden_size": 8}},
        {"intermediate_size": [8, 16], "image_size": [4, 4], "quantization_config": {"group_size": -1}},
        {"max_position_embeddings": 131_072, "rope_theta": 1e6, "time_step_limit": [0.0, float("inf")]},
        {"num_nextn_predict_layers": 0, "attention_layers": ["global"], "num_logits_to_keep": 0, "use_cache": True},
        {"num_classes": 0, "head_layers": [0, 1], "grid_size": [14, 14]},
        {"vision_config": {"depth": 0, "hidden_size": 8}},  # a tower that only embeds patches
    ],
)
def test_what_real_configurations_hold_is_let_through(config: dict[str, Any], tmp_path: Path) -> None:
    assert check_config(write(tmp_path, config, a=[8, 8])) == config


@pytest.mark.parametrize(
    ("config", "mention"),
    [
        ({"hidden_size": 8.0}, "hidden_size=8.0 must be a positive whole number"),
        ({"text_config": {"num_hidden_layers": "two"}}, 'text_config.num_hidden_layers="two"'),
        ({"vision_config": [1]}, "must be an object"),
        ({"rope_scaling": "linear"}, "must be an object"),
        ({"hidden_size": 8, "num_attention_heads": 3}, "num_attention_heads=3 must divide hidden_size=8"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3, "head_dim": 2}, "must divide num_attention_heads=4"),
        ({"num_experts": 10**9}, "num_experts"),
        ({"hidden_size": 8, "vocab_size": 60_000}, "vocab_size=60000 times hidden_size=8"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
        ({"num_hidden_layers": 1025}, "num_hidden_layers"),
        ({"vision_config": {"depth": -1}}, "vision_config.depth=-1"),
        ({"rope_theta": "big"}, "rope_theta"),
    ],
)
def test_what_is_no_size_or_too_large_for_the_weights_is_named(
    config: dict[str, Any], mention: str, tmp_path: Path
) -> None:
    with pytest.raises(TersorError) as error:
        check_config(write(tmp_path, config, a=[8, 8]))
    assert mention in str(error.value)


def test_a_library_is_not_passed_on_raw() -> None:
    with pytest.raises(TersorError, match="it cannot be loaded") as error, refused("it"):
        raise KeyError("inside\nof the library")
    assert "inside" not in str(error.value)
    assert isinstance(error.value.__cause__, KeyError)
    with pytest.raises(MemoryError), refused("it"):
        raise MemoryError


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_number_that_is_not_finite_is_found(value: float, dtype: torch.dtype) -> None:
    tensors = {"a": torch.full((100,), 3e4, dtype=dtype), "b": torch.ones(3, 3, dtype=dtype)}
    check_finite({**tensors, "ids": torch.arange(3), "none": torch.empty(0)}, "x")
    tensors["b"][1, 1] = value
    with pytest.raises(TersorError, match="x: b holds NaN or infinity"):
        check_finite(tensors, "x")


def test_a_model_is_loaded_whole_or_not(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = load_checked(LlamaForCausalLM, zoo.path("tiny-lm"))
    assert not model.training
    variant("tiny-lm", tmp_path / "more", {"num_hidden_layers": 9})
    with pytest.raises(TersorError, match=r"weights are missing, first model\.layers\.8"):
        load_checked(LlamaForCausalLM, tmp_path / "more")

"""Fields of a configuration that decide, and those that say nothing about weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CONFIGS, build
from transformers import AutoConfig, LlamaForSequenceClassification
from tuned_models import tuned

from tersor.experts.architecture import architecture_fields, check_same_architecture
from tersor.experts.compress import compress_expert
from tersor.experts.config import ConfigMismatchError

pytestmark = pytest.mark.filterwarnings("ignore:no calibration data")
ADDED = {
    "unsloth_version": "2026.1", "model_max_length": 2048, "tokenizer_class": "LlamaTokenizer", "sep_token_id": 3,
    "decoder_start_token_id": 0, "_attn_implementation_autoset": True, "auto_map": {"AutoConfig": "a.B"},
    "pad_token_id": 5, "use_cache": False, "attention_dropout": 0.1, "quantization_note": {"bits": 4},
    "torch_dtype": "bfloat16", "max_position_embeddings": 4096, "name_of_a_tool_that_is_not_written_yet": [1],
}  # fmt: skip
DECIDING = {
    "rms_norm_eps": 1e-3, "hidden_act": "gelu", "num_attention_heads": 2, "attention_bias": True, "head_dim": 16,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
}  # fmt: skip


def saved(model: Any, folder: Path, **fields: Any) -> Path:
    model.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def test_what_tools_add_refuses_no_expert(base: Any, expert: Any, tmp_path: Path) -> None:
    origin = saved(base, tmp_path / "base")
    delta = compress_expert(origin, saved(expert, tmp_path / "expert", **ADDED))
    assert delta.manifest.modules
    delta.save_pretrained(tmp_path / "delta")


@pytest.mark.parametrize("name", DECIDING)
def test_a_field_of_the_architecture_is_named_with_both_values(name: str, base: Any) -> None:
    other = copy.deepcopy(base.config)
    setattr(other, name, DECIDING[name])
    with pytest.raises(ConfigMismatchError, match=rf"differ in {name}.*; .*pack against .*{name}"):
        check_same_architecture(base.config, other)


def test_fields_within_a_larger_configuration_are_named_by_their_path() -> None:
    config = build("qwen2_5_vl").config
    other = copy.deepcopy(config)
    other.text_config.pad_token_id = 7
    check_same_architecture(config, other)
    other.text_config.rms_norm_eps = 1e-2
    with pytest.raises(ConfigMismatchError, match=r"text_config\.rms_norm_eps"):
        check_same_architecture(config, other)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_class_declares_its_sizes_and_a_saved_configuration_equals_itself(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]()
    assert {"hidden_size", "num_attention_heads", "num_hidden_layers"} <= set(architecture_fields(config))
    config.save_pretrained(tmp_path)
    check_same_architecture(config, AutoConfig.from_pretrained(tmp_path))


def test_another_class_of_model_is_refused(base: Any) -> None:
    other = LlamaForSequenceClassification(copy.deepcopy(base.config))
    with pytest.raises(ConfigMismatchError, match="LlamaForSequenceClassification; load both as one class"):
        compress_expert(base, tuned(other, 1))

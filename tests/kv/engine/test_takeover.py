"""Which model a session takes over."""

from __future__ import annotations

import pytest
from tiny_models import model
from torch import nn

from tersor.kv.engine.takeover import inner_model


def test_of_a_wrapper_the_model_inside_is_taken():
    assert inner_model(nn.Sequential(model("llama"))) is model("llama")


def test_models_side_by_side_are_refused_by_name():
    with pytest.raises(TypeError, match="LlamaForCausalLM, Qwen2ForCausalLM"):
        inner_model(nn.ModuleList([model("llama"), model("qwen2")]))

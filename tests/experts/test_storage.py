"""The paper's ratios, from configurations alone."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tersor.experts.storage import ModelSize

GB = 1e9


@pytest.fixture(scope="module")
def mistral() -> ModelSize:
    return ModelSize.of(MistralConfig(), MistralForCausalLM)


@pytest.fixture(scope="module")
def router() -> int:
    """Bytes of Qwen1.5-1.8B in 16 bits, with the shape that its configuration gives."""
    config = Qwen2Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=16, tie_word_embeddings=False,
    )  # fmt: skip
    size = ModelSize.of(config, Qwen2ForCausalLM)
    assert size.linear_weights + size.others == 1_836_828_672
    return size.bytes_16


def test_sizes_of_mistral(mistral: ModelSize) -> None:
    assert (mistral.linear_weights, mistral.outputs, mistral.others) == (6_979_321_856, 1_376_256, 262_410_240)
    assert mistral.bytes_16 / GB == pytest.approx(14.483, abs=5e-4)
    assert mistral.expert_bytes(bits=2, salient=0) / GB == pytest.approx(2.27, abs=5e-3)


def test_three_experts(mistral: ModelSize, router: int) -> None:
    """The paper's 2.04 without and 1.74 with its router."""
    apart = 3 * mistral.bytes_16
    for k, alone, routed in ((0, 2.040, 1.740), (4, 2.037, 1.738)):
        assert apart / mistral.total_bytes(3, bits=2, salient=k) == pytest.approx(alone, abs=6e-4)
        assert apart / mistral.total_bytes(3, bits=2, salient=k, router=router) == pytest.approx(routed, abs=6e-4)
    same = mistral.total_bytes(3, bits=2, salient=0, others_changed=False)
    assert apart / same == pytest.approx(2.20, abs=5e-3)


def test_sixteen_experts_fit_one_gpu(mistral: ModelSize, router: int) -> None:
    assert mistral.total_bytes(16, bits=2, salient=0) / GB == pytest.approx(50.8, abs=0.05)
    assert mistral.total_bytes(16, bits=2, salient=0, router=router) / GB == pytest.approx(54.5, abs=0.05)
    assert 17 * mistral.bytes_16 / GB > 240


def test_tied_weights_are_counted_once() -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes = [
        ModelSize.of(LlamaConfig(**shape, vocab_size=1000, tie_word_embeddings=tied), LlamaForCausalLM).others
        for tied in (False, True)
    ]
    assert sizes[0] - sizes[1] == 64_000

"""A delta is bound to every tensor of its base, whether it changes it or relies on it as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build
from transformers import LlamaConfig, LlamaForCausalLM
from tuned_models import tuned

from tersor.experts.compress import compress_expert
from tersor.experts.config import BaseMismatchError, ConfigMismatchError
from tersor.experts.delta import ExpertDelta
from tersor.experts.host import ExpertHost
from tersor.experts.identity import SAMPLED, tensor_hash, tensor_hashes
from tersor.experts.sources import Source
from tersor.experts.verify import compare_weights

pytestmark = pytest.mark.filterwarnings("ignore:no calibration data")


def changed(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        with torch.no_grad():
            model.state_dict()[name].view(-1)[0] += 1

    return change


def slower_rotation(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= 0.9


def untied_head(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)


CHANGES = {
    "embeddings": changed("model.embed_tokens.weight"),
    "head": changed("lm_head.weight"),
    "a norm": changed("model.layers.1.input_layernorm.weight"),
    "a linear that the expert changed": changed("model.layers.0.self_attn.q_proj.weight"),
    "a linear that it did not": changed("model.layers.0.mlp.up_proj.weight"),
    "a buffer": slower_rotation,
}


@pytest.fixture(scope="module")
def delta(base: Any) -> ExpertDelta:
    """Of an expert that changed queries, and left everything else as it was."""
    return compress_expert(base, tuned(base, 1, only="q_proj"))


@pytest.mark.parametrize("name", CHANGES)
def test_a_base_that_differs_in_one_tensor_is_refused(name: str, base: Any, delta: ExpertDelta) -> None:
    other = copy.deepcopy(base)
    CHANGES[name](other)
    host = ExpertHost(other)
    with pytest.raises(BaseMismatchError, match="is another one"):
        host.load_expert("math", delta)
    assert not host.list_experts()
    ExpertHost(copy.deepcopy(base)).load_expert("math", delta)


def test_a_stored_buffer_and_a_tied_head_belong_to_the_base(base: Any) -> None:
    tied = LlamaForCausalLM(LlamaConfig(**{**base.config.to_dict(), "tie_word_embeddings": True})).eval()
    tied.register_buffer("scale", torch.ones(3))
    delta = compress_expert(tied, tuned(tied, 1, only="q_proj"))
    for change in (changed("scale"), untied_head):
        other = copy.deepcopy(tied)
        change(other)
        with pytest.raises(BaseMismatchError, match=r"scale|lm_head"):
            ExpertHost(other).load_expert("math", delta)
    ExpertHost(copy.deepcopy(tied)).load_expert("math", delta)


def test_equal_weights_under_another_rotary_base_are_another_base(base: Any, delta: ExpertDelta) -> None:
    other = copy.deepcopy(base)
    other.config.rope_parameters = {**other.config.rope_parameters, "rope_theta": 500_000.0}
    rotated = type(other)(other.config)
    rotated.load_state_dict(base.state_dict())
    with pytest.raises(ConfigMismatchError, match=r"rope_parameters\.rope_theta"):
        ExpertHost(rotated).load_expert("math", delta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_that_was_cast_keeps_its_buffers(base: Any, dtype: torch.dtype) -> None:
    half = copy.deepcopy(base).to(dtype)
    delta = compress_expert(half, tuned(half, 1))
    ExpertHost(half).load_expert("math", delta)


def test_the_short_hash_sees_shapes_and_samples_and_the_full_one_all() -> None:
    small, large = torch.zeros(SAMPLED), torch.zeros(2 * SAMPLED)
    for tensor, place, seen in ((small, 1, True), (large, 0, True), (large, 1, False)):
        other = tensor.clone()
        other[place] = 1
        assert (tensor_hash(tensor, full=False) != tensor_hash(other, full=False)) == seen
        assert tensor_hash(tensor, full=True) != tensor_hash(other, full=True)
    assert tensor_hash(small.view(2, -1), full=False) != tensor_hash(small, full=False)
    assert tensor_hash(small, full=True) == tensor_hash(small.bfloat16(), full=True)


def test_full_verification_finds_a_single_weight(tmp_path: Path) -> None:
    base = build("llama")
    config = LlamaConfig(**{**base.config.to_dict(), "vocab_size": 4096})  # a table larger than the sample
    base = LlamaForCausalLM(config).eval()
    expert = tuned(base, 1, only="q_proj")
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    delta = compress_expert(tmp_path / "base", tmp_path / "expert")
    compare_weights(delta, tmp_path / "base", tmp_path / "expert", full=True)
    with torch.no_grad():
        for model in (base, expert):
            model.model.embed_tokens.weight[0, 1] += 1e-3
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    compare_weights(delta, tmp_path / "base", tmp_path / "expert")  # between the samples
    with pytest.raises(BaseMismatchError, match="embed_tokens"):
        compare_weights(delta, tmp_path / "base", tmp_path / "expert", full=True)


def test_a_folder_and_its_model_have_the_same_hashes(base: Any, tmp_path: Path) -> None:
    tied = LlamaForCausalLM(LlamaConfig(**{**base.config.to_dict(), "tie_word_embeddings": True}))
    for name, model in {"plain": base, "tied": tied}.items():
        model.save_pretrained(tmp_path / name)
        with Source(tmp_path / name) as read:
            assert tensor_hashes(read) == tensor_hashes(Source(model))

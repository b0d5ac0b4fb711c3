"""A forward over prompt and completion: the same as decoding, again when the backward pass recomputes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from teacher_forcing import by_decoding, completion_of
from tiny_models import build, model, prompt
from torch import Tensor
from transformers import PreTrainedModel

from tersor._compat import checkpoint_activations
from tersor.kv.prefill.sparse import SparsePrefill
from tersor.kv.zipvl import ZipVL

SPARSE = ZipVL(tau=0.8, min_tokens=0)


RECIPES = {
    "drop": SPARSE,
    "compute": ZipVL(tau=0.8, min_tokens=0, query_mode="compute"),
    "first layer dense": ZipVL(tau=0.8, min_tokens=0, skip_layers=(0,)),
    "short": ZipVL(tau=0.8, min_tokens=500),
    "keep": ZipVL(tau=0.8, min_tokens=0, policy="keep"),
    "quantize": ZipVL(tau=0.8, min_tokens=0, policy="quantize", high_bits=16, low_bits=16),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_teacher_forcing_is_prefill_and_decoding(name: str, recipe: str) -> None:
    if name == "gemma2" and recipe == "first layer dense":
        return check_teacher_forcing(name, ZipVL(tau=0.6, min_tokens=0), {"input_ids": prompt(2, 70)})
    return check_teacher_forcing(name, RECIPES[recipe], {"input_ids": prompt(2, 70)})


def check_teacher_forcing(name: str, recipe: Any, inputs: dict[str, Tensor], tokens: int = 10) -> None:
    net = model(name)
    with recipe.on(net) as session, torch.no_grad():
        forced = net(**inputs, completion_mask=completion_of(inputs["input_ids"], tokens)).logits
        kept, ratio = session.stats.kept, session.stats.token_ratio
        decoded, _ = by_decoding(net, session.method, inputs, tokens)
        assert session.stats.token_ratio == ratio
        assert all(torch.equal(a, b) for x, y in zip(kept, session.stats.kept, strict=True) for a, b in zip(x, y))  # noqa: B905
        # The completion must not have been looked at, nor be counted.
        other = {**inputs, "input_ids": inputs["input_ids"].clone()}
        other["input_ids"][:, -tokens:] = prompt(len(forced), tokens, seed=9)
        net(**other, completion_mask=completion_of(inputs["input_ids"], tokens))
        assert all(torch.equal(a, b) for x, y in zip(kept, session.stats.kept, strict=True) for a, b in zip(x, y))  # noqa: B905
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    one, other_logits = forced.log_softmax(-1)[real], decoded.log_softmax(-1)[real]
    torch.testing.assert_close(one, other_logits, atol=1e-4, rtol=0)
    assert ratio < 1.0 or recipe == RECIPES["short"]


def test_teacher_forcing_of_a_left_padded_batch() -> None:
    ids = prompt(3, 70)
    mask = torch.ones_like(ids)
    mask[0, :31] = 0
    mask[2, :7] = 0
    check_teacher_forcing("llama", SPARSE, {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask})


def test_the_check_catches_a_completion_that_is_taken_for_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.kv.prefill.sparse.prompt_tokens", lambda real, completion: real)
    with pytest.raises(AssertionError):
        check_teacher_forcing("llama", SPARSE, {"input_ids": prompt(2, 70)})


def gradients(net: PreTrainedModel, checkpointing: bool) -> tuple[dict[str, Tensor], tuple]:
    ids = prompt(2, 60)
    net.train()
    if checkpointing:
        checkpoint_activations(net)
    net.zero_grad()
    with SPARSE.on(net) as session:
        out = net(input_ids=ids, completion_mask=completion_of(ids, 12), labels=ids)
        # Another forward and another state of the global generator come before the recomputation, as in training.
        kept = session.stats.kept
        net(input_ids=ids[:1, :40], completion_mask=completion_of(ids[:1, :40], 3))
        torch.manual_seed(123)
        out.loss.backward()
    net.eval()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_checkpointing_recomputes_the_same_choice_and_gradients(name: str) -> None:
    net = build(name)
    (plain, kept), (again, _), (recomputed, kept_again) = [gradients(net, each) for each in (False, False, True)]
    assert all(torch.equal(a, b) for x, y in zip(kept, kept_again, strict=True) for a, b in zip(x, y, strict=True))
    text = [key for key in plain if "visual" not in key and "vision" not in key]
    assert any(key.endswith("q_proj.weight") and bool(plain[key].any()) for key in text)
    for key in text:
        assert torch.equal(plain[key], again[key])
        torch.testing.assert_close(recomputed[key], plain[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_state_is_there_when_the_backward_pass_recomputes(checkpointing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the gradients would be those of dense layers."""
    chosen, choose = [], SparsePrefill.choose

    def noting(self, call, prompt):
        chosen.append(call.module.layer_idx)
        return choose(self, call, prompt)

    monkeypatch.setattr(SparsePrefill, "choose", noting)
    gradients(build("llama"), checkpointing)
    assert chosen == ([0, 1, 0, 1, 1, 0] if checkpointing else [0, 1, 0, 1])

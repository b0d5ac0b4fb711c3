"""Rows of a batch are answered by their own expert, whatever it replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import build
from tuned_models import IDS, logits, tuned

from tersor.experts.compress import compress_expert
from tersor.experts.config import (
    DeltaConfig,
)
from tersor.experts.host import ExpertHost, merge_expert

pytestmark = pytest.mark.filterwarnings("ignore:no calibration data")


@pytest.mark.parametrize("name", ["qwen2", "phi", "mistral", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_class_and_precision(name: str, dtype: torch.dtype) -> None:
    """Biases, normed queries, fused and other names of linears; one row the base's, two of two experts."""
    base = build(name, dtype=dtype)
    host = ExpertHost(base)
    wanted = [logits(base)[:1]]
    for seed in (1, 2):
        delta = compress_expert(base, tuned(base, seed), DeltaConfig(num_salient=3))
        wanted.append(logits(merge_expert(base, delta))[seed : seed + 1])
        host.load_expert(f"e{seed}", delta)
    with host.use([None, "e1", "e2"]) as model:
        found = logits(model, IDS[:3])
    wanted_all = torch.cat(wanted)
    error = (found - wanted_all).float().norm() / wanted_all.float().norm()
    assert float(error) < (1e-5 if dtype == torch.float32 else 4e-2)


def test_beams_and_returned_sequences_stay_with_their_row(host: ExpertHost, merged: dict[str | None, Any]) -> None:
    rows = ["math", None, "chat"]
    mask = torch.ones_like(IDS[:3])
    kwargs = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "num_return_sequences": 2, "pad_token_id": 0}
    found = host.generate(input_ids=IDS[:3], attention_mask=mask, expert_names=rows, **kwargs)
    for row, name in enumerate(rows):
        alone = merged[name].generate(input_ids=IDS[row : row + 1], attention_mask=mask[:1], **kwargs)
        assert found[2 * row : 2 * row + 2].tolist() == alone.tolist()


def test_an_expert_whose_final_norm_alone_differs_switches(merged: dict[str | None, Any]) -> None:
    base = build("llama")
    expert = tuned(base, 5, only="model.norm", size=1.0)
    delta = compress_expert(base, expert)
    assert delta.manifest.full == ["model.norm.weight"]
    host = ExpertHost(base)
    host.load_expert("norm", delta)
    with host.use(["norm", None]) as model:
        found = logits(model, IDS[:2])
    assert torch.allclose(found[0], logits(expert)[0], atol=1e-5)
    assert torch.allclose(found[1], logits(merged[None])[1], atol=1e-5)


def test_vocabularies_of_two_sizes_in_one_batch() -> None:
    base = build("llama")
    expert = tuned(base, 3)
    expert.resize_token_embeddings(203, mean_resizing=False)
    host = ExpertHost(base)
    host.load_expert("more", compress_expert(base, expert, DeltaConfig(num_salient=1.0, salient_dtype="float32")))
    ids = IDS[:2].clone()
    ids[0, 3] = 201
    with host.use(["more", None]) as model:
        found = logits(model, ids)
    assert found.shape[-1] == 203
    assert torch.allclose(found[0], logits(expert, ids[:1])[0], atol=1e-3)
    assert bool((found[1, :, 199:] == -torch.inf).all())


def test_gradients_reach_the_inputs_through_a_delta(host: ExpertHost, merged: dict[str | None, Any]) -> None:
    embedded = merged["math"].get_input_embeddings()(IDS[:1]).detach().requires_grad_()
    other = embedded.detach().clone().requires_grad_()
    with host.use("math") as model:
        model(inputs_embeds=embedded).logits.square().sum().backward()
    merged["math"](inputs_embeds=other).logits.square().sum().backward()
    assert torch.allclose(embedded.grad, other.grad, rtol=1e-3, atol=1e-3 * float(other.grad.abs().max()))

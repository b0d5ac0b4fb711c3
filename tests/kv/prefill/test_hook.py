"""What the hook tells the attention layers: the prompt, its pictures, and whether a cache goes along."""

from __future__ import annotations

import pytest
import torch
from teacher_forcing import by_decoding, completion_of
from tiny_models import IMAGE, VL_NAMES, model, prompt, question
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from tersor._compat import with_cache
from tersor.kv.zipvl import ZipVL

SPARSE = ZipVL(tau=0.8, min_tokens=0)


@pytest.mark.parametrize("policy", ["evict", "keep"])
def test_generating_without_a_cache_knows_the_prompt(policy) -> None:
    net = model("llama")
    options = {"max_new_tokens": 12, "do_sample": False}
    with ZipVL(tau=0.8, min_tokens=0, policy=policy).on(net) as session:
        cached = net.generate(prompt(2, 60), **options)
        ratio = session.stats.token_ratio
        assert torch.equal(net.generate(prompt(2, 60), use_cache=False, **options), cached)
        assert session.stats.token_ratio == ratio
    if policy == "evict":
        assert not torch.equal(net.generate(prompt(2, 60), **options), cached)


def test_a_forward_of_unknown_prompt_is_dense_and_says_so() -> None:
    net = model("llama")
    expected = net(prompt(1, 60)).logits
    with SPARSE.on(net), pytest.warns(UserWarning, match="completion_mask"):
        torch.testing.assert_close(net(prompt(1, 60), use_cache=False).logits, expected)


def test_an_empty_library_cache_is_replaced_and_a_filled_one_refused() -> None:
    net = model("llama")
    filled = DynamicCache(config=net.config)
    net(prompt(1, 10), **with_cache(filled))
    with SPARSE.on(net) as session, torch.no_grad():
        out = net(prompt(1, 60), **with_cache(DynamicCache(config=net.config)))
        assert out.past_key_values is session.cache
        assert session.cache.layers[0].segments
        with pytest.raises(ValueError, match="holds 10 tokens already"):
            net(prompt(1, 60), **with_cache(filled))
        with pytest.raises(NotImplementedError, match="StaticCache cannot be compressed"):
            net(prompt(1, 60), **with_cache(StaticCache(config=net.config, max_cache_len=80)))


def test_text_is_protected_only_where_it_can_be_told() -> None:
    for name, inputs in (("llama", {"input_ids": prompt(1, 40)}), ("llava", {"inputs_embeds": torch.randn(1, 40, 32)})):
        net = model(name)
        recipe = ZipVL(tau=0.8, min_tokens=0, protect="text")
        with recipe.on(net), pytest.raises(ValueError, match="which tokens are text"):
            net(**inputs)
        with SPARSE.on(net) as session, torch.no_grad():
            net(**inputs)
            assert session.stats.token_ratio < 1


def test_wrong_completion_masks_are_refused() -> None:
    net, ids = model("llama"), prompt(1, 40)
    early = torch.zeros(1, 40, dtype=torch.bool)
    early[0, :5] = True
    with SPARSE.on(net), torch.no_grad():
        with pytest.raises(ValueError, match=r"shape \(1, 8\), but the input is \(1, 40\)"):
            net(ids, completion_mask=torch.zeros(1, 8))
        with pytest.raises(ValueError, match="completions come last"):
            net(ids, completion_mask=early)
        cache = net(ids).past_key_values
        with pytest.raises(ValueError, match="without a cache"):
            net(ids, completion_mask=~early, **with_cache(cache))


@pytest.mark.parametrize("name", VL_NAMES)
def test_vision_language_models_prune_and_go_on(name: str) -> None:
    net = model(name)
    inputs = question(net)
    ids = inputs["input_ids"]
    visual = ids[0] == IMAGE
    recipe = ZipVL(tau=0.6, min_tokens=0, protect="text")
    with recipe.on(net) as session, torch.no_grad():
        net.generate(**inputs, max_new_tokens=6, do_sample=False)
        stats = session.stats
    assert stats.visual_ratio is not None
    assert stats.visual_ratio < 1.0
    for own, share, physical in zip(stats.kept, stats.visual_per_layer or (), stats.physical_lengths, strict=True):
        chosen = torch.zeros_like(visual)
        chosen[own[0]] = True
        assert bool(chosen[~visual].all())
        assert share == pytest.approx(float(chosen[visual].float().mean()))
        assert physical == len(own[0]) + 5
    assert session.cache.get_seq_length() == ids.shape[1] + 5
    # Without protection text may go too, and decoding goes on from positions that were not renumbered.
    more = {**inputs, "input_ids": torch.cat([ids, prompt(1, 4, seed=4)], 1)}
    more["attention_mask"] = torch.ones_like(more["input_ids"])
    if "mm_token_type_ids" in more:
        more["mm_token_type_ids"] = (more["input_ids"] == IMAGE).long()
    check_teacher_forcing_here(net, more)


def check_teacher_forcing_here(net: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    with SPARSE.on(net) as session, torch.no_grad():
        forced = net(**inputs, completion_mask=completion_of(inputs["input_ids"], 4)).logits
        assert session.stats.token_ratio < 1.0
        decoded, cache = by_decoding(net, session.method, inputs, 4)
        dense, _ = by_decoding(net, ZipVL(tau=1.0).method(), inputs, 4)
    torch.testing.assert_close(forced.log_softmax(-1), decoded.log_softmax(-1), atol=1e-4, rtol=0)
    assert not torch.allclose(dense[:, -4:], decoded[:, -4:], atol=1e-2)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def left_padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Questions about pictures as one batch."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids")

    def padded(name: str, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (longest - x.shape[1], 0)) if name in per_token else x

    return {name: torch.cat([padded(name, row[name]) for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("name", VL_NAMES)
def test_questions_of_a_batch_get_the_answers_they_get_alone(name: str) -> None:
    net = model(name)
    rows = [question(net), question(net, seed=3, words=20)]
    options = {"max_new_tokens": 6, "do_sample": False}
    with ZipVL(tau=0.8, min_tokens=0, protect="text").on(net) as session:
        together = net.generate(**left_padded(rows), **options)[:, -6:]
        assert session.stats.tokens == tuple(row["input_ids"].shape[1] for row in rows)
        for row, answer in zip(rows, together, strict=True):
            assert torch.equal(net.generate(**row, **options)[0, -6:], answer)
            ratio = session.stats.token_ratio
            assert torch.equal(net.generate(**row, use_cache=False, **options)[0, -6:], answer)
            assert session.stats.token_ratio == ratio < 1

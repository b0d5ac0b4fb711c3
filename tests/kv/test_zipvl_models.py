"""ZipVL on whole models: families, teacher forcing, gradients, generation and compositions."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from tiny_models import IMAGE, VL_NAMES, build, prompt, question
from torch import Tensor, nn
from transformers import PreTrainedModel

from tersor import MiniCache, ZipCache, compose
from tersor.bench.measure import storage_bytes
from tersor.kv.bench.peers.sparse import fastv, fixed_share, random_share
from tersor.kv.depth.pairs import MergedPairs
from tersor.kv.prefill.sparse import SparsePrefill
from tersor.kv.selection.ratio import SaliencySelection
from tersor.kv.zipvl import ZipVL

SPARSE = ZipVL(tau=0.8, min_tokens=0)
TEXT_NAMES = ["llama", "qwen2", "qwen3", "gemma2", "phi"]


@lru_cache(maxsize=4)
def model(name: str) -> PreTrainedModel:
    return build(name)


def completion_of(ids: Tensor, tokens: int) -> Tensor:
    """The last ``tokens`` of every row."""
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, ids.shape[1] - tokens :] = True
    return mask


def by_decoding(net: PreTrainedModel, method: Any, inputs: dict[str, Tensor], tokens: int) -> tuple[Tensor, Any]:
    """Logits of the prompt and then of its last ``tokens``, one step each; and the cache."""
    ids, cache = inputs["input_ids"], method.cache(net.config)
    start = ids.shape[1] - tokens
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    first = {name: x[:, :start] if name in per_token else x for name, x in inputs.items()}
    logits = [net(**first, past_key_values=cache).logits]
    padded = not bool(inputs.get("attention_mask", ids + 1).all())
    for i in range(start, ids.shape[1]):
        mask = {"attention_mask": inputs["attention_mask"][:, : i + 1]} if padded else {}
        logits.append(net(input_ids=ids[:, i : i + 1], past_key_values=cache, **mask).logits)
    return torch.cat(logits, 1), cache


# -- property 9: teacher forcing and decoding ----------------------------------------------------------------------

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


# -- property 10: determinism and gradients ------------------------------------------------------------------------


def gradients(net: PreTrainedModel, checkpointing: bool) -> tuple[dict[str, Tensor], tuple]:
    ids = prompt(2, 60)
    net.train()
    if checkpointing:
        net.activation_checkpointing_enable()
    net.zero_grad()
    with SPARSE.on(net) as session:
        out = net(input_ids=ids, completion_mask=completion_of(ids, 12), labels=ids)
        # Another forward and another state of the global generator come before the recomputation, as in training.
        kept = session.stats.kept
        net(input_ids=ids[:1, :40], completion_mask=completion_of(ids[:1, :40], 3))
        torch.manual_seed(123)
        out.loss.backward()
    net.activation_checkpointing_disable()
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


# -- property 6: an unselected token -------------------------------------------------------------------------------


def test_an_unselected_token_passes_by_residual_and_mlp_alone() -> None:
    net = model("llama")
    seen: list[tuple[Tensor, Tensor]] = []
    layer = net.model.layers[0]
    handle = layer.register_forward_hook(lambda m, args, kwargs, out: seen.append((args[0], out)), with_kwargs=True)
    with SPARSE.on(net) as session, torch.no_grad():
        net(prompt(1, 60))
        kept = session.stats.kept[0][0].tolist()
    handle.remove()
    before, after = seen[0][0], seen[0][1] if isinstance(seen[0][1], Tensor) else seen[0][1][0]
    with torch.no_grad():
        alone = before + layer.mlp(layer.post_attention_layernorm(before))
    others = sorted(set(range(60)) - set(kept))
    assert len(others) > 10
    assert torch.equal(after[0, others], alone[0, others])
    assert not torch.equal(after[0, kept], alone[0, kept])


# -- property 8: logical and physical length -----------------------------------------------------------------------


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


def test_the_vision_tower_keeps_its_own_attention() -> None:
    """A plain string would switch it as well; modules that are not causal go to the library."""
    net = build("qwen2_5_vl")
    inputs = question(net)
    with torch.no_grad():
        features = net.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[0]
        net.set_attn_implementation("tersor")
        same = net.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[0]
    assert torch.equal(features, same)


def test_padding_on_either_side_changes_no_row() -> None:
    net = model("qwen2")
    ids, lengths = prompt(2, 90), (37, 90)
    for side in ("left", "right"):
        mask = torch.ones_like(ids)
        places = [slice(90 - n, 90) if side == "left" else slice(0, n) for n in lengths]
        mask[0] = 0
        mask[0, places[0]] = 1
        position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
        with SPARSE.on(net) as session, torch.no_grad():
            together = net(ids, attention_mask=mask, position_ids=position_ids).logits
            kept = session.stats.kept
            assert session.stats.tokens == lengths
            for row, place in enumerate(places):
                alone = net(ids[row : row + 1, place]).logits
                torch.testing.assert_close(together[row, place], alone[0], atol=1e-4, rtol=1e-4)
                for many, one in zip(kept, session.stats.kept, strict=True):
                    assert (many[row] - place.start).tolist() == one[0].tolist()


# -- property 13: generating ---------------------------------------------------------------------------------------

MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "return sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams returned": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_every_way_of_generating_is_that_of_the_dense_model_at_tau_one(name: str, mode: str) -> None:
    net = model(name)
    ids = prompt(2, 50)
    mask = torch.ones_like(ids)
    mask[1, :21] = 0
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, **MODES[mode]}
    torch.manual_seed(1)
    expected = net.generate(ids, **options)
    for policy in ("evict", "keep"):
        with ZipVL(tau=1.0, min_tokens=0, policy=policy).on(net):
            torch.manual_seed(1)
            assert torch.equal(net.generate(ids, **options), expected)


def test_beams_keep_rows_with_their_own_tokens() -> None:
    """Beams that cannot leave their row: the best one of a batch is the one of the row alone."""
    net, ids = model("llama"), prompt(2, 60)
    options = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    with SPARSE.on(net):
        together = net.generate(ids, **options)
        for row in range(2):
            assert torch.equal(net.generate(ids[row : row + 1], **options)[0], together[row])


def test_sparse_batches_generate_as_single_rows() -> None:
    net, ids = model("llama"), prompt(3, 60)
    mask = torch.ones_like(ids)
    mask[1, :25] = 0
    for policy in ("evict", "keep", "quantize"):
        recipe = ZipVL(tau=0.8, min_tokens=0, policy=policy)
        with recipe.on(net):
            together = net.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
            for row, start in enumerate((0, 25, 0)):
                alone = net.generate(ids[row : row + 1, start:], max_new_tokens=12, do_sample=False)
                assert torch.equal(alone[0, 60 - start :], together[row, 60:])


@pytest.mark.parametrize("policy", ["evict", "quantize", "keep"])
def test_a_second_turn_goes_on_with_the_cache(policy) -> None:
    """The first prompt's choice stays, and the second prompt is read whole."""
    net = model("llama")
    recipe = ZipVL(tau=0.8, min_tokens=0, policy=policy, high_bits=16, low_bits=16)
    with recipe.on(net) as session:
        cache = recipe.cache(net.config)
        first = net.generate(prompt(1, 60), past_key_values=cache, max_new_tokens=10, do_sample=False)
        kept, ratio = len(session.stats.kept[0][0]), session.stats.token_ratio
        physical = session.stats.physical_lengths[0]
        assert physical == (kept if policy == "evict" else 60) + 9
        longer = torch.cat([first, prompt(1, 30, seed=5)], dim=1)
        second = net.generate(longer, past_key_values=cache, max_new_tokens=10, do_sample=False)
        assert session.stats.token_ratio == ratio
    assert cache.get_seq_length() == 109
    assert session.stats.physical_lengths[0] == physical + 1 + 30 + 9
    # What it says is what the same steps say one by one.
    with recipe.on(net), torch.no_grad():
        fresh = recipe.cache(net.config)
        net(second[:, :60], past_key_values=fresh)
        logits = [net(second[:, i : i + 1], past_key_values=fresh).logits for i in range(60, 109)]
    assert torch.cat(logits, 1)[0, 39:].argmax(-1).tolist() == second[0, 100:].tolist()


def test_a_short_prompt_is_quantized_like_generated_tokens() -> None:
    net = model("llama")
    for tokens, segments in ((150, 1), (60, 0)):
        with ZipVL(tau=0.8, policy="quantize").on(net) as session, torch.no_grad():
            first = net(prompt(1, tokens)).logits
            layer = session.cache.layers[0]
            assert len(layer.segments) == segments
            net.generate(prompt(1, tokens), max_new_tokens=102 - tokens if not segments else 2, do_sample=False)
            assert session.stats.skipped_reason == "short"
            assert len(session.cache.layers[0].segments) == 1
        torch.testing.assert_close(first, net(prompt(1, tokens)).logits)


# -- stats ---------------------------------------------------------------------------------------------------------


def test_stats_count_what_is_there() -> None:
    net = model("llama")
    with ZipVL(tau=0.8, min_tokens=0, skip_layers=(1,)).on(net) as session, torch.no_grad():
        net.generate(prompt(2, 60), max_new_tokens=5, do_sample=False)
        stats = session.stats
    first, second = (len(own) / 60 for own in stats.kept[0])
    assert stats.tokens == (60, 60)
    assert stats.per_layer == pytest.approx(((first + second) / 2, 1.0))
    assert stats.per_row == pytest.approx(((first + 1) / 2, (second + 1) / 2))
    mean = (first + second + 2) / 4
    assert stats.token_ratio == pytest.approx(mean)
    assert stats.attn_flops_reduction == pytest.approx(1 - mean**2)
    assert stats.attn_flops_reduction_exact == pytest.approx(1 - (first**2 + second**2 + 2) / 4)
    assert stats.attn_flops_reduction >= stats.attn_flops_reduction_exact
    assert stats.visual_ratio is None
    layers = session.cache.layers
    assert stats.kv_bytes == storage_bytes([layers[0].owned(), layers[1].keys, layers[1].values])
    assert stats.kv_dense_bytes == 2 * 2 * 2 * 2 * 64 * 2 * 8
    assert stats.physical_lengths == (max(map(len, stats.kept[0])) + 4, 64)
    assert stats.mass_per_layer[1] == 1.0
    assert 0.5 < stats.mass_per_layer[0] < 1.0
    assert stats.skipped_reason is None
    assert set(stats.to_dict()) == {name for name in stats.__dataclass_fields__ if name != "kept"}


def test_stats_say_why_nothing_was_left_out_and_when_there_are_none() -> None:
    net = model("llama")
    with ZipVL().on(net) as session:
        with pytest.raises(ValueError, match="run the model first"):
            _ = session.stats
        net.generate(prompt(1, 40), max_new_tokens=2)
        assert session.stats.skipped_reason == "short"
        assert session.stats.token_ratio == 1.0
    with ZipCache().on(net) as session, pytest.raises(ValueError, match="zipcache reads prompts densely"):
        _ = session.stats
    with ZipVL(min_tokens=0, tau=0.7, query_mode="compute").on(net) as session, torch.no_grad():
        net(prompt(1, 60))
        assert session.stats.attn_flops_reduction == pytest.approx(1 - session.stats.token_ratio)


def test_a_ratio_can_be_asked_for() -> None:
    net = model("llama")
    samples = [{"input_ids": prompt(1, 80, seed=i)} for i in range(3)]
    recipe = ZipVL.for_ratio(net, samples, 0.5, min_tokens=0, policy="quantize")
    assert recipe.policy == "quantize"
    ratios = []
    for sample in samples:
        with recipe.on(net) as session, torch.no_grad():
            net(**sample)
        ratios.append(session.stats.token_ratio)
    assert sum(ratios) / 3 == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="no tau keeps 20%"):
        ZipVL.for_ratio(net, samples, 0.2, min_tokens=100)
    for wrong in ([], samples):
        with pytest.raises(ValueError, match="it takes at least one"):
            ZipVL.for_ratio(net, wrong, 0.5 if not wrong else 1.5)


# -- baselines -----------------------------------------------------------------------------------------------------


def test_baselines_keep_what_they_are_told() -> None:
    net = model("qwen2_5_vl")
    inputs = question(net)
    tokens, visual = inputs["input_ids"].shape[1], int((inputs["input_ids"] == IMAGE).sum())

    def stats(method):
        with method.on(net) as session, torch.no_grad():
            net(**inputs)
        return session.stats

    for build_method in (fixed_share, random_share):
        assert stats(build_method(0.4, min_tokens=0)).per_layer == pytest.approx((round(0.4 * tokens) / tokens,) * 2)
        own = stats(build_method([1.0, 0.5], min_tokens=0))
        assert own.per_layer == pytest.approx((1.0, 0.5))
        assert tokens - 1 in own.kept[1][0].tolist()
    draws = [stats(random_share(0.4, min_tokens=0, seed=seed)).kept[0][0].tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    own = stats(fastv(0.25, dense_layers=1, min_tokens=0))
    assert own.per_layer[0] == 1.0
    assert own.visual_per_layer[1] == pytest.approx(round(0.25 * visual) / visual)


def test_fastv_chooses_once() -> None:
    net = build("llama", sharpness=2.0)
    chosen = []
    with fastv(0.3, dense_layers=0, min_tokens=0, visual_only=False).on(net) as session, torch.no_grad():
        net(prompt(1, 60))
        chosen = [own[0].tolist() for own in session.stats.kept]
        assert session.stats.physical_lengths == (len(chosen[0]),) * 2
    assert chosen[0] == chosen[1]
    with fixed_share(0.3, min_tokens=0).on(net) as session, torch.no_grad():
        net(prompt(1, 60))
        assert session.stats.kept[0][0].tolist() != session.stats.kept[1][0].tolist()


def test_selections_by_head_are_refused() -> None:
    with pytest.raises(ValueError, match="one set of tokens for all heads"):
        SparsePrefill(selection=SaliencySelection(ratio=0.5, scope="kv_head"))


# -- compositions --------------------------------------------------------------------------------------------------

MINI = MiniCache(start_layer=0, max_relative_error=2.0)


def test_compositions_prefill_sparsely_and_store_as_the_other_recipe_says() -> None:
    net = model("llama")
    for recipes, bits in (
        ((ZipVL(tau=0.8, min_tokens=0, policy="quantize"), MINI), {"4-bit", "2-bit"}),
        ((ZipVL(tau=0.8, min_tokens=0, policy="keep"), MINI), {"4-bit"}),
        ((ZipVL(tau=0.8, min_tokens=0, policy="keep"), ZipCache(saliency_ratio=0.5)), {"4-bit", "2-bit"}),
    ):
        outputs = []
        for ordered in (recipes, recipes[::-1]):
            method = compose(*ordered).method()
            assert isinstance(method.prefill, SparsePrefill)
            with method.on(net) as session, torch.no_grad():
                outputs.append(net.generate(prompt(2, 60), max_new_tokens=30, do_sample=False))
            widths = session.cache.summary()["tokens_by_width"]
            assert set(widths) - {"buffer"} == bits
            assert session.stats.token_ratio < 0.7
            assert isinstance(method.depth, MergedPairs) == (recipes[1] is MINI)
        assert torch.equal(*outputs)
    assert compose(ZipVL(policy="keep"), MINI).method().name == compose(MINI, ZipVL(policy="keep")).method().name


def test_a_lossless_composition_is_zipvl_alone() -> None:
    """Merging that retains every token, stored raw, changes nothing."""
    net = model("llama")
    composed = compose(ZipVL(tau=0.8, min_tokens=0, policy="keep"), MiniCache(start_layer=0, gamma=1.0, bits=16))
    options = {"max_new_tokens": 20, "do_sample": False}
    with ZipVL(tau=0.8, min_tokens=0, policy="keep").on(net):
        expected = net.generate(prompt(2, 60), **options)
    with composed.on(net):
        assert torch.equal(net.generate(prompt(2, 60), **options), expected)


def test_contradicting_compositions_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"ZipVL \(by policy='evict'\) and ZipCache .* both choose the selection"):
        compose(ZipVL(), ZipCache())
    with pytest.raises(ValueError, match="evicts does not go with merged layers"):
        compose(ZipVL(), MINI)

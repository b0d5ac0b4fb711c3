"""Rollouts at several thresholds."""

from __future__ import annotations

import pytest
import torch
from tiny_models import model, prompt
from transformers import GenerationConfig

from tersor.kv.zipvl import ZipVL
from tersor.rl.rollout import budgets, multi_budget_generate

TAUS = torch.tensor([0.5, 0.8, 0.95, 1.0], dtype=torch.float64)


def config(**options) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=8, pad_token_id=0, eos_token_id=[7, 9], **options)


def test_budgets_go_through_the_grid_again_and_again() -> None:
    assert budgets([0.5, 0.6, 0.7], 7).tolist() == [0.5, 0.6, 0.7, 0.5, 0.6, 0.7, 0.5]


def test_rollouts_of_one_prompt_differ_by_their_threshold_alone() -> None:
    """At one threshold the ratio is exact, whatever was answered; over the grid it never falls."""
    net, ids = model("llama"), prompt(1, 64).expand(4, -1)
    with ZipVL(tau=0.9, min_tokens=0).on(net) as session:
        torch.manual_seed(0)
        same = multi_budget_generate(session, {"input_ids": ids}, torch.full((4,), 0.8), config(do_sample=True))
        grid = multi_budget_generate(session, {"input_ids": ids}, TAUS, config(do_sample=True))
    assert len({tuple(each) for each in same.completions}) > 1
    assert same.token_ratio.std() == 0.0
    assert (grid.token_ratio.diff() >= 0).all() and grid.token_ratio[0] < grid.token_ratio[3] == 1.0
    assert grid.visual_ratio.isnan().all()


def test_answers_end_with_the_token_that_ended_them_and_their_probabilities_are_the_models() -> None:
    net, ids = model("llama"), prompt(6, 64)
    taus = torch.full((6,), 0.7, dtype=torch.float64)
    with ZipVL(tau=0.9, min_tokens=0).on(net) as session:
        torch.manual_seed(1)
        found = multi_budget_generate(session, {"input_ids": ids}, taus, config(do_sample=True, temperature=1.5))
        for row, (said, known) in enumerate(zip(found.completions, found.logprobs, strict=True)):
            assert len(said) == len(known) <= 8
            assert not {7, 9} & set(said[:-1]) and (len(said) == 8 or said[-1] in (7, 9))
            whole = torch.cat([ids[row], torch.tensor(said)])[None]
            mask = torch.arange(whole.shape[1])[None] >= 64
            with torch.no_grad(), session.thresholds(taus[:1]):
                logits = net(whole, completion_mask=mask).logits / 1.5
            again = logits[0, 63:-1].log_softmax(-1).gather(1, torch.tensor(said)[:, None])[:, 0]
            torch.testing.assert_close(again, torch.tensor(known), rtol=1e-4, atol=1e-5)


def test_what_is_no_rollout_is_refused() -> None:
    net, ids = model("llama"), prompt(2, 64)
    with ZipVL(tau=0.9, min_tokens=0).on(net) as session:
        with pytest.raises(ValueError, match="one sampled answer a row"):
            multi_budget_generate(session, {"input_ids": ids}, TAUS[:2], config(num_beams=2))
        with pytest.raises(ValueError, match="4 thresholds for 2 rows"):
            multi_budget_generate(session, {"input_ids": ids}, TAUS, config())

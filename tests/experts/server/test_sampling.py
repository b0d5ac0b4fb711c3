"""Tokens of one answer: what the request asks for, and nothing of any other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tersor._errors import UnsupportedError
from tersor.experts.server.sampling import LEAST, NotFiniteError, Sampler, Sampling, own_sampling

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])


def drawn(logits: torch.Tensor = LOGITS, n: int = 400, prompt: Any = (), **settings: Any) -> list[int]:
    sampler = Sampler(Sampling(**settings), list(prompt))
    return [sampler.pick(logits).token for _ in range(n)]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert set(drawn()) == {1}
    assert len(set(drawn(temperature=1.0, seed=1))) == 5


def test_a_seed_says_what_is_drawn_and_no_seed_draws_anew() -> None:
    assert drawn(temperature=1.0, seed=3) == drawn(temperature=1.0, seed=3) != drawn(temperature=1.0, seed=4)
    assert drawn(temperature=1.0, seed=-3) == drawn(temperature=1.0, seed=-3)
    assert drawn(temperature=1.0) != drawn(temperature=1.0)


def test_shares_are_those_of_the_softmax_at_the_temperature() -> None:
    found = drawn(temperature=2.0, seed=1, n=4000)
    wanted = (LOGITS / 2).softmax(-1)
    for token, share in enumerate(wanted.tolist()):
        assert found.count(token) / 4000 == pytest.approx(share, abs=4 * math.sqrt(share / 4000))


def test_top_k_top_p_and_min_p_leave_the_likeliest() -> None:
    assert set(drawn(temperature=1.0, seed=1, top_k=2)) == {1, 4}
    assert set(drawn(temperature=1.0, seed=1, top_p=0.5)) == {1, 4}  # 0.45 alone is not half
    assert set(drawn(temperature=1.0, seed=1, min_p=0.3)) == {1, 2, 4}


def test_bias_and_penalties_move_the_models_logits() -> None:
    assert set(drawn(logit_bias={3: 100})) == {3}
    assert 1 not in drawn(temperature=1.0, seed=1, logit_bias={1: -100})
    assert drawn(n=3, presence_penalty=0.6) == [1, 4, 1]  # 2, then 1.4 against 1.5, then 1.4 against 0.9
    assert drawn(n=5, frequency_penalty=0.6) == [1, 4, 1, 2, 4]
    assert drawn(n=1, prompt=[1], presence_penalty=2.0) == [1], "the prompt is not counted"
    assert drawn(n=1, prompt=[1], repetition_penalty=2.0) == [4]


def test_log_probabilities_are_the_models_own_whatever_is_drawn() -> None:
    own = LOGITS.log_softmax(-1)
    picked = Sampler(Sampling(logit_bias={3: 100}, temperature=0.5, top_logprobs=2), []).pick(LOGITS)
    assert picked.token == 3 and picked.logprob == pytest.approx(float(own[3]))
    assert [token for token, _ in picked.top] == [1, 4]
    assert [value for _, value in picked.top] == pytest.approx([float(own[1]), float(own[4])])
    assert Sampler(Sampling(top_logprobs=0), []).pick(LOGITS).top == ()
    assert Sampler(Sampling(), []).pick(LOGITS).logprob is None
    never = torch.tensor([0.0, -torch.inf])
    assert Sampler(Sampling(top_logprobs=2), []).pick(never).top[1] == (1, LEAST)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_is_an_error(bad: float) -> None:
    logits = LOGITS.clone()
    logits[2] = bad
    with pytest.raises(NotFiniteError):
        Sampler(Sampling(), []).pick(logits)
    with pytest.raises(NotFiniteError):
        Sampler(Sampling(), []).pick(torch.full((3,), -torch.inf))


def test_logits_stay_as_they_are() -> None:
    before = LOGITS.clone()
    drawn(logit_bias={3: 5}, presence_penalty=1, temperature=0.3, top_k=2, seed=1, n=5)
    assert torch.equal(LOGITS, before)


def test_an_experts_own_settings_are_read_as_generate_reads_them() -> None:
    assert own_sampling("x", {"eos_token_id": 1, "temperature": 0.3}) == {"repetition_penalty": 1.0}
    found = own_sampling("x", {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1})
    assert found == {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1}
    assert own_sampling("x", {"num_beams": 1, "no_repeat_ngram_size": 0, "suppress_tokens": None})
    with pytest.raises(UnsupportedError, match="'x' have no_repeat_ngram_size=3"):
        own_sampling("x", {"no_repeat_ngram_size": 3})


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-7])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.5}, {"top_k": 2, "min_p": 0.1, "logit_bias": {1: -100.0}}])
def test_a_temperature_that_is_hardly_any_draws_the_likeliest_token(temperature: float, more: Any) -> None:
    sampler = Sampler(Sampling(temperature=temperature, **more), [3])
    for at in (0, 2, 3):
        logits = torch.tensor([-5.0, -90.0, -torch.inf, 2.0]) - 40
        logits[at] = 30.0
        assert sampler.pick(logits).token == at

"""The token ratio with a gradient: against the whole count, finite differences, and an independent counter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from teacher_forcing import completion_of
from tiny_models import build, model, prompt

from tersor.kv.engine.state import RowThresholds
from tersor.kv.selection.mass import smallest_set
from tersor.kv.zipvl import ZipVL
from tersor.rl.sparsity import effective_count, soft_count, soft_token_ratio

RECIPE = ZipVL(tau=0.9, min_tokens=0)
TAUS = torch.tensor([0.6, 0.9], dtype=torch.float64)


@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 200), tau=st.floats(0.01, 0.999), power=st.integers(1, 12))
def test_the_soft_count_is_less_than_one_token_below_the_count(seed: int, tokens: int, tau: float, power: int) -> None:
    sums = torch.rand(3, tokens, generator=torch.Generator().manual_seed(seed)) ** power + 1e-9
    shares = torch.full((3,), tau, dtype=torch.float64)
    below = smallest_set(sums, shares) - soft_count(sums, shares)
    assert ((below >= -1e-9) & (below < 1)).all()


def test_the_soft_count_of_even_attention_is_the_threshold() -> None:
    assert soft_count(torch.ones(1, 40), torch.tensor([0.6])).item() == pytest.approx(24.0)
    assert soft_count(torch.tensor([[3.0, 1.0]]), torch.tensor([0.9])).item() == pytest.approx(1.6)


@pytest.mark.parametrize("count", [soft_count, effective_count])
def test_counts_have_the_gradient_of_their_values(count) -> None:
    sums = torch.rand(2, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tau = torch.tensor([0.55, 0.93], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: count(x, tau), (sums,))


def test_the_effective_count_is_that_of_even_shares() -> None:
    sums = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]])
    assert effective_count(sums, torch.tensor([0.9])).item() == pytest.approx(4.0)


@pytest.mark.parametrize("count", [soft_count, effective_count])
def test_tokens_without_any_attention_have_no_gradient_that_is_no_number(count) -> None:
    sums = torch.tensor([[3.0, 2.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    count(sums, torch.tensor([0.9, 0.9])).sum().backward()
    assert sums.grad is not None and sums.grad.isfinite().all() and sums.grad[0, :3].abs().min() > 0


def forward(net, ids, *, taus=TAUS, recipe=RECIPE):
    """The session after a training forward, to be read inside of it."""
    rows = RowThresholds(taus, differentiable=True)
    session = recipe.on(net).enable()
    net(ids, completion_mask=completion_of(ids, 4), thresholds=rows)
    session.disable()
    return session


def test_the_soft_ratio_is_below_the_measured_one_by_less_than_the_last_token_and_one() -> None:
    net, ids = build("llama").train(), prompt(2, 64)
    session = forward(net, ids)
    measured, soft = torch.tensor(session.stats.per_row), soft_token_ratio(session)
    # The last token of a prompt always stays; Eq. (6) does not count it where it is not among the largest.
    assert ((soft <= measured) & (soft > measured - 2 / 60)).all()
    counted = torch.stack(
        [smallest_set(record.scored.scores.sums[:, 0], TAUS) / 60 for record in session.state.records.values()]
    )
    assert ((counted.mean(0) >= soft) & (counted.mean(0) < soft + 1 / 60)).all()


def test_the_soft_ratio_moves_as_its_gradient_says() -> None:
    """A small step of one layer's queries, by finite difference, where no token changes its rank."""
    net, ids = build("llama").double().train(), prompt(2, 64)
    weight = net.model.layers[0].self_attn.q_proj.weight
    soft_token_ratio(forward(net, ids)).sum().backward()
    for layer in net.model.layers:
        assert layer.self_attn.q_proj.weight.grad.abs().max() > 0
        assert layer.self_attn.k_proj.weight.grad.abs().max() > 0
    # Later layers see other tokens once a choice changes, so the first layer's own share is what is compared.
    first = [share(net, ids)]
    (first[0].sum()).backward()
    gradient = torch.autograd.grad(share(net, ids).sum(), weight)[0]
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
            values.append(share(net, ids).sum().item())
            weight -= sign * step * direction
    assert (values[0] - values[1]) / (2 * step) == pytest.approx((gradient * direction).sum().item(), rel=1e-3)


def share(net, ids):
    """The soft count of the first layer."""
    return soft_count(forward(net, ids).state.records[0].scored.scores.sums[:, 0], TAUS)


def test_dense_rows_layers_and_short_prompts_count_whole() -> None:
    net, ids = build("llama").train(), prompt(2, 64)
    first_dense = ZipVL(tau=0.9, min_tokens=0, skip_layers=(0,))
    assert soft_token_ratio(forward(net, ids, recipe=first_dense)).min() > 0.5
    found = soft_token_ratio(forward(net, ids, taus=torch.tensor([1.0, 0.6])))
    assert found[0] == 1.0 > found[1]
    short = soft_token_ratio(forward(net, ids, recipe=ZipVL(tau=0.9, min_tokens=100)))
    assert short.tolist() == [1.0, 1.0]


def test_a_ratio_that_would_have_no_gradient_is_refused() -> None:
    net, ids = build("llama").train(), prompt(2, 64)
    with RECIPE.on(net) as session:
        net(ids, completion_mask=completion_of(ids, 4))
        with pytest.raises(ValueError, match="no thresholds by row"):
            soft_token_ratio(session)
        with session.thresholds(TAUS):
            net(ids, completion_mask=completion_of(ids, 4))
        with pytest.raises(ValueError, match="layer 0: the scores of this forward have no gradient"):
            soft_token_ratio(session)
        with torch.no_grad():
            assert soft_token_ratio(session).max() < 1


@pytest.mark.filterwarnings("ignore:.*(gradient_checkpointing|use_reentrant|requires_grad=True)")
def test_reentrant_checkpointing_is_refused() -> None:
    net, ids = build("llama").train(), prompt(2, 64)
    net.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="not reentrant"):
        soft_token_ratio(forward(net, ids))


def test_scores_that_are_not_finite_are_refused() -> None:
    net, ids = build("llama").train(), prompt(2, 64)
    with torch.no_grad():
        net.model.layers[1].self_attn.q_proj.weight.fill_(torch.inf)
    with pytest.warns(UserWarning, match="layer 1"), pytest.raises(ValueError, match="layer 1: attention scores"):
        soft_token_ratio(forward(net, ids))


def test_the_ratio_of_generated_rows_is_that_of_an_independent_count() -> None:
    """Counts keys that the attention of a layer is really given, by a hook on the library's kernel."""
    net, ids, seen = model("llama"), prompt(2, 64), []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def counted(query, key, *rest, **options):
        seen.append((query.shape[2], key.shape[2]))
        return kernel(query, key, *rest, **options)

    with RECIPE.on(net) as session, session.thresholds(torch.tensor([0.6])), torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention = counted
        try:
            net(ids[:1])
        finally:
            torch.nn.functional.scaled_dot_product_attention = kernel
        assert all(queries == keys for queries, keys in seen)
        assert session.stats.per_layer == pytest.approx([keys / 64 for _, keys in seen], abs=1e-9)

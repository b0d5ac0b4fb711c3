"""A threshold for each row: the same choice as a method with that ``tau``, on every way a prompt is read."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from teacher_forcing import completion_of
from tiny_models import VL_NAMES, build, model, prompt, question
from torch import Tensor

from tersor.kv.engine.state import RowThresholds
from tersor.kv.minicache import MiniCache
from tersor.kv.session import Session
from tersor.kv.zipcache import ZipCache
from tersor.kv.zipvl import ZipVL

TAUS = torch.tensor([0.5, 0.8, 0.95, 1.0], dtype=torch.float64)
OPTIONS = {"max_new_tokens": 6, "do_sample": False}


def recipe(tau: float = 0.9, **settings) -> ZipVL:
    return ZipVL(tau=tau, **{"min_tokens": 0, "skip_layers": (0,), **settings})


def alone(net, ids: Tensor, tau: float, **inputs) -> tuple[Tensor, tuple[float, ...]]:
    """Logits of one row under a method with its ``tau``, and its ratios."""
    if tau == 1.0:
        with torch.no_grad():
            return net(input_ids=ids, **inputs).logits, (1.0,) * net.config.get_text_config().num_hidden_layers
    with recipe(tau).on(net) as session, torch.no_grad():
        return net(input_ids=ids, **inputs).logits, session.stats.per_layer


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_each_row_is_read_as_by_a_method_with_its_threshold(name: str) -> None:
    net, ids = model(name), prompt(4, 48)
    with recipe().on(net) as session, torch.no_grad():
        with session.thresholds(TAUS):
            logits, kept = net(ids).logits, session.stats
        assert len({round(share, 6) for share in kept.per_row}) == 4
    for row, tau in enumerate(TAUS.tolist()):
        expected, per_layer = alone(net, ids[row : row + 1], tau)
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-4, atol=1e-5)
        assert [len(layer[row]) / 48 for layer in kept.kept] == pytest.approx(list(per_layer))


def test_rows_of_one_are_dense_bit_for_bit() -> None:
    net, ids = build("llama"), prompt(2, 48)
    with torch.no_grad():
        expected = net(ids).logits
        with recipe(skip_layers=()).on(net) as session, session.thresholds(torch.ones(2)):
            assert torch.equal(net(ids).logits, expected)
            assert session.stats.token_ratio == 1.0


@pytest.mark.parametrize("name", VL_NAMES[:3])
def test_padding_and_pictures_change_nothing(name: str) -> None:
    net = model(name)
    inputs = question(net)
    ids, width = inputs["input_ids"], 7
    padded = {
        **inputs,
        "input_ids": torch.nn.functional.pad(ids, (width, 0)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (width, 0)),
        "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (width, 0)),
    }
    with recipe().on(net) as session, session.thresholds(torch.tensor([0.7])), torch.no_grad():
        expected = net(**inputs).logits
        ratio = session.stats.token_ratio
        torch.testing.assert_close(net(**padded).logits[:, width:], expected, rtol=1e-4, atol=1e-5)
        assert session.stats.token_ratio == ratio < 1


def test_generate_and_a_forward_over_prompt_and_completion_agree() -> None:
    net, ids = model("llama"), prompt(4, 48)
    with recipe().on(net) as session, torch.no_grad():
        with session.thresholds(TAUS):
            said = net.generate(ids, output_logits=True, return_dict_in_generate=True, **OPTIONS)
            kept = session.stats.per_row
        again = net(
            said.sequences, completion_mask=completion_of(said.sequences, 6), thresholds=RowThresholds(TAUS)
        ).logits
    assert session.stats.per_row == kept
    torch.testing.assert_close(again[:, -7:-1], torch.stack(said.logits, 1), rtol=1e-4, atol=1e-4)


def test_thresholds_end_with_their_block_and_a_keyword_goes_first() -> None:
    net, ids = model("llama"), prompt(2, 48)
    ratios = []
    with recipe().on(net) as session, torch.no_grad():
        for outer in (None, 0.5):
            with session.thresholds(torch.full((2,), outer)) if outer else nullcontext():
                net(ids)
                ratios.append(session.stats.token_ratio)
                net(ids, thresholds=RowThresholds(torch.full((2,), 0.7)))
                ratios.append(session.stats.token_ratio)
        net(ids)
    assert ratios[1] == ratios[3] and ratios[2] < ratios[1] < ratios[0] == session.stats.token_ratio


def gradients(net, ids: Tensor, *, checkpointing: bool = False) -> dict[str, Tensor]:
    """Gradient of the scores' squares, by parameter."""
    net.train()
    if checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    net.zero_grad()
    with recipe(skip_layers=()).on(net) as session:
        rows = RowThresholds(torch.tensor([0.6, 0.9]), differentiable=True)
        net(ids, completion_mask=completion_of(ids, 4), thresholds=rows)
        sums = [record.scored.scores.sums for record in session.state.records.values()]
        torch.stack(sums).square().sum().backward()
    return {name: weight.grad.clone() for name, weight in net.named_parameters() if weight.grad is not None}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_scores_with_a_gradient_reach_queries_and_keys_of_every_sparse_layer() -> None:
    ids = prompt(2, 40)
    plain = gradients(build("llama"), ids)
    for layer in range(2):
        for name in ("q_proj", "k_proj"):
            assert plain[f"model.layers.{layer}.self_attn.{name}.weight"].abs().max() > 0
    again = gradients(build("llama"), ids, checkpointing=True)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)


def test_scores_have_no_gradient_unless_they_are_asked_for() -> None:
    net, ids = build("llama").train(), prompt(2, 40)
    with recipe().on(net) as session, session.thresholds(torch.tensor([0.6, 0.9])):
        net(ids, completion_mask=completion_of(ids, 4))
        assert not any(record.scored.scores.sums.requires_grad for record in session.state.records.values())


@pytest.mark.parametrize("tau", [[0.5, 1.5], [0.0, 0.5], [[0.5, 0.5]], [float("nan"), 0.5]])
def test_thresholds_outside_their_range_are_refused(tau) -> None:
    with recipe().on(model("llama")) as session, pytest.raises(ValueError, match="one share a row"):  # noqa: SIM117
        with session.thresholds(torch.tensor(tau)):
            pass


def test_thresholds_must_fit_the_rows_and_the_method() -> None:
    net, ids = model("llama"), prompt(2, 48)
    with recipe().on(net) as session, session.thresholds(torch.tensor([0.5])):
        with pytest.raises(ValueError, match="1 thresholds for a forward of 2 rows"):
            net(ids)
        with pytest.raises(ValueError, match="1 thresholds for a forward of 2 rows"):
            net.generate(ids, **OPTIONS)
    for method in (ZipCache(), MiniCache(start_layer=0), recipe(tau=1.0), recipe(policy="quantize")):
        with method.on(net) as session, pytest.raises(ValueError, match="takes no thresholds by row"):  # noqa: SIM117
            with session.thresholds(torch.tensor([0.5, 0.5])):
                pass
        with method.on(net), pytest.raises(ValueError, match="takes no thresholds by row"):
            net(ids, thresholds=RowThresholds(torch.tensor([0.5, 0.5])))
    session: Session = recipe().on(net)
    with pytest.raises(RuntimeError, match="not active"):  # noqa: SIM117
        with session.thresholds(torch.tensor([0.5, 0.5])):
            pass

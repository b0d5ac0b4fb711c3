"""Losses of recipes on pieces, against forwards of the model with the recipe itself."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build, model, prompt

from tersor import MiniCache, ZipCache
from tersor._compat import with_cache
from tersor.bench.measure import bootstrap_difference, bootstrap_interval
from tersor.kv.tune import losses as module
from tersor.kv.tune.losses import Losses, measure, ratio_on, split_at

PIECES = prompt(3, 64)
RECIPES = {
    "2 bits": ZipCache(saliency_ratio=1.0, high_bits=2),
    "raw": ZipCache(saliency_ratio=1.0, high_bits=16),
    "mixed": ZipCache(),
}


@pytest.fixture(scope="module")
def measured() -> dict[str, Losses]:
    return measure(model("llama"), PIECES, RECIPES, lambda _: None)


def test_losses_are_those_of_a_session(measured: dict[str, Losses]) -> None:
    net, recipe = model("llama"), RECIPES["mixed"]
    for index, piece in enumerate(PIECES.split(1)):
        begun, rest = piece[:, :55], piece[:, 55:]
        with torch.inference_mode():
            exact = net(piece).logits[:, 55:-1].log_softmax(-1)
            with recipe.on(net):
                cache = recipe.cache(net.config)
                net(begun, **with_cache(cache))
                found = net(rest[:, :-1], **with_cache(cache)).logits.log_softmax(-1)
        own = [each.gather(2, rest[:, 1:, None]).mean().item() for each in (exact, found)]
        assert measured["mixed"].added[index] == pytest.approx(own[0] - own[1], abs=1e-4)
        divergence = torch.nn.functional.kl_div(found, exact, log_target=True, reduction="sum") / 8
        assert measured["mixed"].divergence[index] == pytest.approx(divergence.item(), rel=1e-3)


def test_what_loses_nothing_has_no_loss_and_fewer_bits_have_more(measured: dict[str, Losses]) -> None:
    assert measured["raw"].mean == pytest.approx(0.0, abs=1e-6)
    assert measured["raw"].added == pytest.approx([0.0] * 3, abs=1e-5)
    assert measured["2 bits"].mean > measured["mixed"].mean > 1e-3


def test_bytes_are_those_of_the_cache(measured: dict[str, Losses]) -> None:
    net = model("llama")
    ratio = ratio_on(net, PIECES)
    for name, recipe in RECIPES.items():
        with recipe.on(net) as session, torch.no_grad():
            net(PIECES[:, :55])
            assert measured[name].held == session.cache.memory_footprint()
            assert measured[name].ratio == session.cache.compression_ratio()
        assert measured[name].ratio == ratio(recipe)


def test_how_many_pieces_are_read_together_changes_nothing(
    measured: dict[str, Losses], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 1)
    told: list[str] = []
    alone = measure(model("llama"), PIECES, RECIPES, told.append)
    assert told == [*RECIPES] * 3
    for name, own in alone.items():
        assert own.divergence == pytest.approx(measured[name].divergence, rel=1e-3, abs=1e-6)
        assert (own.held, own.dense) == (measured[name].held, measured[name].dense)


def test_layers_that_are_skipped_cost_nothing_and_count_no_bytes() -> None:
    recipes = {"both": MiniCache(pairs=(), bits=2), "one": ZipCache(skip_layers=(1,), saliency_ratio=1.0, high_bits=2)}
    found = measure(model("llama"), PIECES, recipes, lambda _: None)
    assert found["one"].dense * 2 == found["both"].dense
    assert 0 < found["one"].mean < found["both"].mean


def test_predictions_that_are_not_finite_are_refused() -> None:
    net = build("llama")
    torch.nn.init.constant_(net.lm_head.weight, float("inf"))
    with pytest.raises(ValueError, match="mixed: the model's predictions are not finite"):
        measure(net, PIECES, {"mixed": ZipCache()}, lambda _: None)


def test_intervals_are_the_benchmarks() -> None:
    one, other = Losses([0.1, 0.2, 0.4], [0.0, 0.1, 0.2], 10, 40), Losses([0.0, 0.3, 0.1], [0.3, 0.1, 0.2], 20, 40)
    assert one.ratio == 4.0
    assert one.mean == pytest.approx(0.1)
    assert one.added_loss() == bootstrap_interval(one.added)
    assert one.against(other) == bootstrap_difference(one.added, other.added)
    assert split_at(1024) == 896

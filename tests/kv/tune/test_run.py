"""The search for a plan: what it finds on models whose sensitive layer is known, and what holds for any result."""

from __future__ import annotations

import pytest
from planted_layers import LAYERS, with_sensitive_keys
from tiny_models import build, prompt
from torch import Tensor

from tersor import ZipCache
from tersor.kv.tune.losses import measure
from tersor.kv.tune.run import BY_LAYER, Layer, Tuning, plan_of, tune
from tersor.kv.tune.widths import Cost

HALVES = prompt(4, 256, seed=1), prompt(8, 256, seed=2)


def found(layer: int, halves: tuple[Tensor, Tensor] = HALVES, budget: float = 3.0) -> Tuning:
    return tune(with_sensitive_keys(layer), halves, budget)


@pytest.fixture(scope="module", params=[0, 2])
def planted(request: pytest.FixtureRequest) -> tuple[int, Tuning]:
    """A layer whose keys matter, and what is found on its model."""
    return request.param, found(request.param)


def test_the_sensitive_layers_keys_get_the_most_bits(planted: tuple[int, Tuning]) -> None:
    layer, tuning = planted
    assert tuning.settings[0].name == BY_LAYER
    keys = [bits for bits, _ in tuning.widths()]
    assert all(keys[layer] > keys[other] for other in range(LAYERS) if other != layer)
    narrow = [each.keys[2].loss for each in tuning.layers]
    assert narrow.index(max(narrow)) == layer


def test_the_plan_loses_less_than_any_single_setting_at_no_more_bytes(planted: tuple[int, Tuning]) -> None:
    _, tuning = planted
    plan, *singles = tuning.settings
    assert len(singles) >= 4
    for single in singles:
        assert plan.held_out.mean < single.held_out.mean, single.name
    assert min(each.choosing.ratio for each in tuning.settings) >= 3.0


def test_what_was_measured_is_what_the_plan_does(planted: tuple[int, Tuning]) -> None:
    layer, tuning = planted
    again = measure(with_sensitive_keys(layer), HALVES[1], {"plan": tuning.plan}, lambda _: None)["plan"]
    assert again == tuning.settings[0].held_out


def test_the_same_texts_give_the_same_plan(planted: tuple[int, Tuning]) -> None:
    layer, tuning = planted
    assert found(layer).plan.to_json() == tuning.plan.to_json()


def test_a_choice_is_never_worse_than_the_best_single_setting_where_it_chose(planted: tuple[int, Tuning]) -> None:
    _, tuning = planted
    chosen, best = tuning.settings[0], tuning.best_single
    assert best is not None
    assert chosen.choosing.mean <= best.choosing.mean
    assert best.choosing.mean == min(each.choosing.mean for each in tuning.settings if each.name != BY_LAYER)


def test_a_budget_that_nothing_reaches_is_refused_with_the_nearest_before_any_loss_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tersor.kv.tune.run.measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match=r"9 times smaller: the nearest is (3\.\d+) times, --budget \1x;"):
        found(0, budget=9.0)


def test_a_key_bias_is_taken_out_of_the_keys() -> None:
    tuning = tune(build("qwen2"), HALVES, 3.0)
    subtracted = {each.name for each in tuning.settings if getattr(each.recipe, "subtract_key_bias", False)}
    assert "uniform 3-bit" in subtracted or "keys 4-bit, values 2-bit" in subtracted
    assert all(each.subtract_key_bias for each in tuning.plan.recipes)


def test_a_key_bias_of_a_vision_tower_is_none_of_the_caches() -> None:
    tuning = tune(build("llava"), HALVES, 3.0)
    assert not any(getattr(each.recipe, "subtract_key_bias", False) for each in tuning.settings)


def test_what_misses_the_budget_on_all_pieces_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = (ZipCache(saliency_ratio=1.0, high_bits=bits) for bits in (8, 2))
    monkeypatch.setattr("tersor.kv.tune.run.single_settings", lambda *_: {"wide": wide, "narrow": narrow})
    tuning = found(0)
    assert {each.name for each in tuning.settings} == {"narrow", BY_LAYER}
    assert list(tuning.left_out) == ["wide"]
    assert 1.0 < tuning.left_out["wide"] < 3.0
    monkeypatch.setattr("tersor.kv.tune.run.single_settings", lambda *_: {"wide": wide})
    monkeypatch.setattr("tersor.kv.tune.run.plan_of", lambda *_: None)
    with pytest.raises(ValueError, match=r"3 times smaller: the nearest is (1\.\d+) times, --budget \1x"):
        found(0)


def test_windows_stay_as_they_are_and_the_other_layers_get_their_widths() -> None:
    tuning = tune(build("gemma3"), HALVES, 3.0)
    assert len(tuning.layers) == 1
    assert tuning.settings[0].choosing.ratio >= 3.0


def test_a_budget_is_filled_by_what_saves_most_a_byte() -> None:
    def layer(keys: float) -> Layer:
        costs = {2: Cost(20, keys), 4: Cost(40, 0.0)}
        return Layer(costs, {2: Cost(-20, 0.5), 4: Cost(0, 0.0)}, dense=160)

    # Two layers: 2 x 160 bytes in 16 bits, 0 to 80 in 2 to 4 bits.
    assert plan_of([layer(3.0), layer(0.2)], 320 / 20, {}).layers == (0, 1)
    wide, narrow = plan_of([layer(3.0), layer(0.2)], 320 / 20, {}).recipes
    assert (wide, narrow) == (
        ZipCache(saliency_ratio=1.0, high_bits=4, value_high_bits=2),
        ZipCache(saliency_ratio=1.0, high_bits=2),
    )
    assert plan_of([layer(3.0), layer(0.2)], 320 / 80, {}).layers == (0, 0)


def test_no_plan_where_the_narrowest_widths_are_above_the_budget() -> None:
    costs = {2: Cost(20, 1.0), 8: Cost(80, 0.0)}
    assert plan_of([Layer(costs, costs, dense=160)], 4.1, {}) is None
    assert plan_of([Layer(costs, costs, dense=160)], 4.0, {}) is not None

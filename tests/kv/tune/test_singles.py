"""Single settings: of every family the largest that a budget allows."""

from __future__ import annotations

from typing import Any

import pytest
from planted_layers import with_sensitive_keys
from tiny_models import build, model, prompt

from tersor import MiniCache, ZipCache, compose
from tersor.kv.recipe import Recipe
from tersor.kv.tune.losses import ratio_on
from tersor.kv.tune.singles import LEAST_SHARE, WIDTHS, alike_pairs, single_settings, uniform

PIECES = prompt(2, 256)
MERGING = MiniCache(start_layer=0, max_relative_error=2.0)


def found(budget: float, merging: MiniCache | None = MERGING, **settings: Any) -> dict[str, Recipe]:
    return single_settings(ratio_on(model("llama"), PIECES), budget, merging, settings)


@pytest.mark.parametrize("budget", [1.6, 2.5, 3.0, 3.6])
def test_every_setting_is_within_the_budget_and_the_next_larger_one_is_not(budget: float) -> None:
    ratio = ratio_on(model("llama"), PIECES)
    for name, recipe in found(budget).items():
        assert ratio(recipe) >= budget, name
        if isinstance(recipe, ZipCache) and recipe.saliency_ratio < 1:
            more = ZipCache(
                saliency_ratio=recipe.saliency_ratio + 0.01, high_bits=recipe.high_bits, low_bits=recipe.low_bits
            )
            assert recipe.saliency_ratio >= LEAST_SHARE
            assert ratio(more) < budget, name
        elif isinstance(recipe, ZipCache):
            keys, values = recipe.high_bits, recipe.value_high_bits or recipe.high_bits
            for wider in ((w, values) for w in WIDTHS if w > keys):
                assert ratio(uniform(*wider)) < budget, name


def test_families_are_named_by_what_they_are() -> None:
    settings = found(3.0)
    assert settings["uniform 3-bit"] == ZipCache(saliency_ratio=1.0, high_bits=3)
    assert settings["keys 4-bit, values 2-bit"] == ZipCache(saliency_ratio=1.0, high_bits=4, value_high_bits=2)
    mixed = next(each for name, each in settings.items() if name.startswith("ZipCache 4/2 r=") and "+" not in name)
    assert (mixed.high_bits, mixed.low_bits) == (4, 2)
    assert settings["MiniCache 4-bit"] == MiniCache(start_layer=0, max_relative_error=2.0, bits=4)
    both = next(each for name, each in settings.items() if name.endswith(" + MiniCache"))
    share = both.recipes[0].saliency_ratio
    assert both == compose(ZipCache(saliency_ratio=share), MERGING)


def test_settings_are_those_of_every_zipcache_without_merging() -> None:
    settings = found(3.0, param_dtype="bfloat16")
    plain = [each for each in settings.values() if isinstance(each, ZipCache)]
    assert len(plain) >= 3
    assert all(each.param_dtype == "bfloat16" for each in plain)


def test_without_pairs_nothing_is_merged() -> None:
    assert not any("MiniCache" in name for name in found(3.0, merging=None))


def test_a_budget_out_of_reach_names_the_nearest_one_and_that_one_is_reached() -> None:
    with pytest.raises(ValueError, match=r"no setting makes the cache 20 times smaller") as error:
        found(20.0)
    nearest = float(str(error.value).partition("--budget ")[2].partition("x")[0])
    assert found(nearest)


def test_layers_are_merged_where_they_are_alike_and_else_by_default() -> None:
    net = with_sensitive_keys(0)
    assert alike_pairs(net, PIECES[:1]) == MiniCache(max_relative_error=2.0)
    for a, b in ((0, 1), (2, 3)):  # the same layer again, behind one that adds nothing
        net.model.layers[b].load_state_dict(net.model.layers[a].state_dict())
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            net.model.layers[a].get_submodule(name).weight.data.zero_()
    assert alike_pairs(net, PIECES[:1]) == MiniCache(pairs=((0, 1), (2, 3)), max_relative_error=2.0)


def test_a_model_without_neighbours_to_merge_has_no_pairs() -> None:
    assert alike_pairs(build("gemma3"), PIECES[:1]) is None

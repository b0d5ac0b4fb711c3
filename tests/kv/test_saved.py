"""`tersor.load_cache`: the method comes from the file; what is in one is tested in tests/kv/engine/test_saving.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods import METHODS
from tiny_models import build, prompt

import tersor
from tersor._compat import with_cache
from tersor.kv.engine.saving import SavedCacheError
from tersor.kv.recipe import Recipe
from tersor.kv.settings import recipe_from_json

RECIPES = {name: case.recipe for name, case in METHODS.items() if isinstance(case.recipe, Recipe)}


@pytest.mark.parametrize("name", RECIPES)
def test_the_settings_come_back_from_their_text(name: str) -> None:
    recipe = RECIPES[name]
    read = recipe_from_json(recipe.to_named_json())
    assert read.method() == recipe.method()
    assert read.to_json() == recipe.to_json()


def test_a_loaded_cache_has_the_method_that_made_it(tmp_path: Path) -> None:
    net, recipe = build("llama"), RECIPES["zipcache + minicache"]
    with recipe.on(net) as session, torch.no_grad():
        net(prompt(1, 40))
    session.cache.save(tmp_path / "cache")
    cache = tersor.load_cache(tmp_path / "cache", net.config)
    assert cache.choices == recipe.method()
    assert cache.input_ids is None
    with cache.choices.on(net), torch.no_grad():
        net(prompt(1, 1), **with_cache(cache))
    assert cache.get_seq_length() == 41


def test_settings_that_this_release_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match="has no settings"):
        recipe_from_json('{"zipcache": {"colour": 1}}')
    with pytest.raises(ValueError, match="choose one of"):
        recipe_from_json('{"nocache": {}}')


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SavedCacheError, match="nothing: no such file"):
        tersor.load_cache(tmp_path / "nothing", build("llama").config)

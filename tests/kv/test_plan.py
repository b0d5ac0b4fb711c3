"""Cache plans: what they are made of, their file, and that each layer runs by its own recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import build, model, prompt

from tersor import CachePlan, MiniCache, ZipCache, ZipVL, compose
from tersor._compat import with_cache
from tersor.kv.plan import read_plan
from tersor.kv.recipe import Recipe
from tersor.kv.settings import recipe_from_text

WIDE = ZipCache(saliency_ratio=1.0, high_bits=4, value_high_bits=3)
NARROW = ZipCache(saliency_ratio=0.5, high_bits=3)
PLAN = CachePlan(recipes=(WIDE, NARROW), layers=(1, 0))
WHOLE: dict[str, Recipe] = {
    "one recipe": ZipCache(skip_layers=(0,), max_probe_tokens=64),
    "merged layers": MiniCache(pairs=((0, 1),), max_relative_error=2.0),
    "a composition": compose(MiniCache(start_layer=0, max_relative_error=2.0), ZipCache(saliency_ratio=0.7)),
}
PLANS = {"by layer": PLAN} | {name: CachePlan(recipes=(each,)) for name, each in WHOLE.items()}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_file_holds_a_plan_whole(plan: CachePlan, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json(), encoding="utf-8")
    assert read_plan(file) == plan
    assert recipe_from_text(str(file), []) == plan
    assert CachePlan.from_json(json.dumps(json.loads(plan.to_json()))) == plan


def test_each_layer_is_compressed_by_its_own_recipe() -> None:
    net, ids = model("llama"), prompt(1, 60)

    def cache_of(recipe: Recipe):
        with recipe.on(net) as session, torch.no_grad():
            net(ids)
            return session.cache

    planned = cache_of(PLAN)
    assert planned.summary()["method"] == "plan"
    # The first layer sees the same input with each of them, so that it must store the same.
    alone = cache_of(NARROW)
    for name, tensor in planned.state_dict().items():
        if name.startswith("layers.0."):
            assert torch.equal(tensor, alone.state_dict()[name]), name
    widths = [(group.keys.bits, group.values.bits) for group in planned.compressed_layers()[1].segments[0].groups]
    assert widths == [(4, 3)]


@pytest.mark.parametrize("name", WHOLE)
def test_one_recipe_for_all_layers_is_that_recipe(name: str) -> None:
    net, ids = build("llama"), prompt(1, 60)
    stored = []
    for recipe in (WHOLE[name], CachePlan(recipes=(WHOLE[name],))):
        with recipe.on(net) as session, torch.no_grad():
            net(ids, **with_cache(recipe.cache(net.config)))
            stored.append(session.cache.state_dict())
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][each], stored[1][each]) for each in stored[0])


def test_a_model_with_other_layers_is_refused_before_it_runs() -> None:
    net = model("llama")
    plan = CachePlan(recipes=(WIDE,), layers=(0, 0, 0))
    with pytest.raises(ValueError, match=r"for 3 compressed layers, this model \(LlamaConfig\) has 2; make one"):
        plan.on(net).enable()
    # One of the two layers is a sliding window.
    with pytest.raises(ValueError, match="for 2 compressed layers"):
        PLAN.cache(model("gemma3").config)


REFUSED = {
    "no recipe": ((), None, "plan of 0 recipes"),
    "several for all": ((WIDE, NARROW), None, "plan of 2 recipes needs layers="),
    "merging by layer": ((MiniCache(),), (0, 0), "ZipCache for its layers, got a MiniCache"),
    "sparse by layer": ((ZipVL(),), (0,), "ZipCache for its layers, got a ZipVL"),
    "a plan of plans": ((PLAN,), None, r"a recipe such as ZipCache\(\), got a CachePlan"),
    "no recipe at all": (("zipcache",), None, "got a str"),
    "a place too far": ((WIDE,), (0, 1), r"layers=\(0, 1\) must be places in recipes, from 0 to 0"),
    "no place": ((WIDE,), (), "must be places"),
    "a word": ((WIDE,), ("0",), "must be places"),
    "a flag": ((WIDE, NARROW), (True,), "must be places"),
    "windows apart": (
        (WIDE, ZipCache(streaming_gap=50)),
        (0, 1),
        "streaming_gap=100 and streaming_gap=50; all layers work",
    ),
    "skipped apart": ((WIDE, ZipCache(skip_layers=(1,))), (0, 1), "skip_layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_plan_is_refused_in_one_line(name: str) -> None:
    recipes, layers, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        CachePlan(recipes=recipes, layers=layers)
    assert "\n" not in str(error.value)


def test_a_plan_is_not_composed() -> None:
    with pytest.raises(ValueError, match="a plan is a whole cache and cannot be composed"):
        compose(PLAN, MiniCache())


GOOD = json.loads(PLAN.to_json())
FILES = {
    "no JSON": ("{", "no cache plan"),
    "another list": ("[1]", "no cache plan"),
    "another object": ('{"zipcache": {}}', "no cache plan; `tersor tune` writes one"),
    "another version": (json.dumps(GOOD | {"plan": 2}), "of version 2, known is 1"),
    "an unknown field": (json.dumps(GOOD | {"model": "x"}), r"this one has \['layers', 'model', 'plan', 'recipes'\]"),
    "a missing field": ('{"plan": 1, "recipes": []}', r"this one has \['plan', 'recipes'\]"),
    "recipes of another kind": (json.dumps(GOOD | {"recipes": {}}), "'recipes' is a list"),
    "layers of another kind": (json.dumps(GOOD | {"layers": 1}), "'layers' a list or null"),
    "a recipe without a name": (json.dumps(GOOD | {"recipes": ["zipcache"]}), "an object of settings by the name"),
    "an unknown method": (json.dumps(GOOD | {"recipes": [{"magic": {}}]}), "'magic' is unknown"),
    "an unknown setting": (json.dumps(GOOD | {"recipes": [{"zipcache": {"tau": 1}}]}), r"no settings \['tau'\]"),
    "a word for a number": (
        json.dumps(GOOD | {"recipes": [{"zipcache": {"saliency_ratio": "half"}}]}),
        "a setting of zipcache is of another type",
    ),
    "bytes": (b"\xff", "no cache plan"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_plan_is_refused_with_its_file(name: str, tmp_path: Path) -> None:
    content, message = FILES[name]
    file = tmp_path / "plan.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_plan(file)
    assert str(error.value).startswith(f"{file}")
    assert "\n" not in str(error.value)

"""The matrix of methods: every recipe and composition has every property, or refuses it with a reason."""

from __future__ import annotations

import pytest
from method_properties import PROPERTIES, check
from methods import METHODS, Case

from tersor.kv import METHODS as REGISTERED
from tersor.kv import get_method
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.zipcache import ZipCache
from tersor.lowbit.kernels.packed_attention import PartTable


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_every_property(method: str, name: str) -> None:
    check(METHODS[method], name)


def test_every_registered_method_is_in_the_matrix() -> None:
    assert {get_method(name) for name in REGISTERED} <= {type(case.recipe) for case in METHODS.values()}


def test_a_refusal_that_does_not_come_is_caught() -> None:
    case = METHODS["zipcache"]
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check(Case(case.recipe, case.raw, {"crop": "none can be taken back"}), "crop")


BROKEN = {
    "greedy": "parts",
    "reorder": "map_segments",
    "bytes": "owned",
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_matrix_catches_a_layer_that_forgets_its_segments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(CompressedLayer, BROKEN[name])
    wrong = {
        "parts": PartTable(),
        "map_segments": lambda self, function: None,
        "owned": lambda self: {name: node for name, node in right(self).items() if name != "segments"},
    }
    monkeypatch.setattr(CompressedLayer, BROKEN[name], wrong[BROKEN[name]])
    with pytest.raises((AssertionError, RuntimeError)):
        check(METHODS["zipcache"], name)


def test_the_registry_finds_recipes_by_name() -> None:
    assert get_method("zipcache") is ZipCache
    for name in REGISTERED:
        assert get_method(name)().method().name == name
    with pytest.raises(ValueError, match="choose one of"):
        get_method("nocache")

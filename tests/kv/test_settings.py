"""Recipes from text: names, values by the type of each setting, and what is refused in one line."""

from __future__ import annotations

import pytest

from tersor import MiniCache, ZipCache, ZipVL, compose
from tersor.kv.settings import recipe_from_text


def test_values_have_the_type_of_their_setting() -> None:
    assert recipe_from_text("zipcache", ["saliency_ratio=0.4", "high_bits=8"]) == ZipCache(
        saliency_ratio=0.4, high_bits=8
    )
    assert recipe_from_text("zipcache", ["saliency_ratio=1", "value_high_bits=2"]) == ZipCache(
        saliency_ratio=1, value_high_bits=2
    )
    assert recipe_from_text("zipvl", ["policy=quantize", "skip_layers=0", "check_finite=true"]) == ZipVL(
        policy="quantize", skip_layers=(0,), check_finite=True
    )
    assert recipe_from_text("minicache", ["start_layer=3", "pairs=(2, 3), (4, 5)", "bits=none"]) == MiniCache(
        start_layer=3, pairs=((2, 3), (4, 5))
    )
    assert recipe_from_text("minicache", ["start_layer=0.25", "pairs=(2, 3),"]).pairs == ((2, 3),)


def test_names_make_recipes_and_compositions() -> None:
    assert recipe_from_text("none", []) is None
    # A setting goes to every recipe that has it.
    assert recipe_from_text("zipcache+minicache", ["streaming_gap=40", "gamma=0.1"]) == compose(
        ZipCache(streaming_gap=40), MiniCache(streaming_gap=40, gamma=0.1)
    )


REFUSED = {
    "method": ("magic", [], "'magic' is unknown; choose one of .* or the .json file of a plan"),
    "name": ("zipcache", ["tau=0.9"], "'tau=0.9' is no setting of --cache zipcache; its settings are saliency_ratio, "),
    "no value": ("zipvl", ["tau"], "'tau' must be name=value"),
    "none": ("none", ["high_bits=4"], "no setting of --cache none; it has none"),
    "twice": ("zipcache", ["high_bits=4", "high_bits=8"], "high_bits is given twice"),
    "word": ("zipvl", ["policy=drop"], "policy=drop must be one of evict, quantize, keep"),
    "number": ("zipcache", ["saliency_ratio=half"], "saliency_ratio=half must be a number"),
    "whole number": ("zipcache", ["high_bits=4.5"], "high_bits=4.5 must be a whole number"),
    "flag": ("zipcache", ["check_finite=1"], "check_finite=1 must be true or false"),
    "several": ("zipcache", ["skip_layers=first"], "skip_layers=first must be numbers with commas between them"),
    "either": ("minicache", ["bits=few"], "bits=few must be a whole number or none"),
    "plan": ("missing.json", [], "missing.json: no such file"),
    "plan with settings": ("missing.json", ["high_bits=4"], "'high_bits=4' does not go with a plan"),
    "range": ("zipcache", ["high_bits=5"], "high_bits=5 must be one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(name: str) -> None:
    cache, settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        recipe_from_text(cache, settings)
    assert "\n" not in str(error.value)

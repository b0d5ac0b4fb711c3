"""Merging that costs too much is said once."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_models import alike, prompt

from tersor.kv.minicache import MiniCache


def run(model, recipe: MiniCache) -> None:
    with recipe.on(model), torch.no_grad():
        model.generate(prompt(1, 60), max_new_tokens=30, do_sample=False)


def test_dissimilar_layers_warn_once_with_the_table() -> None:
    model = alike(pairs=(0,))
    settings = {"start_layer": 0, "streaming_gap": 10}
    with pytest.warns(UserWarning, match=r"(?s)MiniCache\.auto.*mean cosine.*\n0, 1 .*\n2, 3 ") as seen:
        run(model, MiniCache(**settings))
    assert len(seen) == 1
    with pytest.raises(ValueError, match=r"max_relative_error=0\.35"):
        run(model, MiniCache(**settings, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, MiniCache(**settings, pairs=((0, 1),), strict=True))

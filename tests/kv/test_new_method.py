"""CONTRIBUTING's walk "add a KV method", followed for real: a file, a row in the registry, an entry in the matrix."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from method_properties import PROPERTIES, check
from methods import SMALL, Case
from tiny_models import build, prompt

from tersor import MiniCache, compose
from tersor.kv import METHODS, get_method

#: What a stranger writes: the newest tokens of every segment in eight bits, the others in two.
FILE = '''
"""NewestFirst: the newest tokens of a segment keep eight bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tersor.kv.engine.choices import check_engine_options, check_setting, pick
from tersor.kv.recipe import Recipe

if TYPE_CHECKING:
    from tersor.kv.method import KVMethod


@dataclass(frozen=True, kw_only=True)
class NewestFirst(Recipe):
    """The newest tokens in ``high_bits``, the others in ``low_bits``."""

    share: float = 0.25
    high_bits: int = 8
    low_bits: int = 2
    streaming_gap: int = 100
    recent_fp_tokens: int = 0
    min_tokens_to_compress: int = 32
    skip_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_engine_options(self)
        check_setting(self, "share", 0.0 <= self.share <= 1.0, "a share between 0 and 1")

    def choices(self) -> dict[str, str]:
        return {"selection": "share", "storage": "high_bits and low_bits"}

    def method(self) -> KVMethod:
        from tersor.kv.method import KVMethod
        from tersor.kv.selection.ratio import RecentSelection
        from tersor.kv.storage.mixed import MixedPrecisionStorage

        selection, storage = RecentSelection(ratio=self.share), pick(MixedPrecisionStorage, self)
        return pick(KVMethod, self, name="newest-first", selection=selection, storage=storage)
'''


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory):
    """The recipe class as the registry finds it."""
    folder: Path = tmp_path_factory.mktemp("stranger")
    (folder / "newest_first.py").write_text(FILE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setitem(METHODS, "newest-first", "newest_first:NewestFirst")
        yield get_method("newest-first")
    sys.modules.pop("newest_first", None)


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_new_method_has_every_property(recipe, name: str) -> None:
    check(Case(recipe(**SMALL), recipe(high_bits=16, low_bits=16, **SMALL)), name)


def test_a_new_method_is_a_recipe_like_the_others(recipe) -> None:
    assert recipe.from_json(recipe(share=0.5).to_json()) == recipe(share=0.5)
    with pytest.raises(ValueError, match="share=2"):
        recipe(share=2)
    both = compose(recipe(**SMALL), MiniCache(start_layer=0, max_relative_error=2.0))
    with both.on(model := build("llama")) as session:
        model.generate(prompt(1, 40), max_new_tokens=12, do_sample=False)
    assert set(session.cache.summary()["tokens_by_width"]) == {"8-bit", "2-bit", "buffer"}

"""A cache plan: which recipe compresses which layer of one model, as `tersor tune` finds and writes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tersor._errors import TersorError, UnsupportedError, WrongTypeError
from tersor.kv.compose import recipe_named
from tersor.kv.engine.choices import ENGINE_OPTIONS
from tersor.kv.recipe import Recipe
from tersor.kv.zipcache import ZipCache

if TYPE_CHECKING:
    from tersor.kv.method import KVMethod

#: Version of the format that `CachePlan.to_json` writes.
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class CachePlan(Recipe):
    """Recipes of a cache, and the layers that each of them compresses.

    Args:
        recipes: One recipe for the whole model, or several `ZipCache` for its layers.
        layers: For each layer that is compressed, in the model's order, its place in ``recipes``; None where one
            recipe takes all layers.

    Example:
        >>> import tersor
        >>> wide, narrow = (tersor.ZipCache(saliency_ratio=1.0, high_bits=bits) for bits in (4, 2))
        >>> plan = tersor.CachePlan(recipes=(wide, narrow), layers=(0, 1, 1, 1, 1, 1, 1, 1))
        >>> tersor.CachePlan.from_json(plan.to_json()) == plan
        True

    Raises:
        TypeError: For recipes of another kind.
        ValueError: For layers that name no recipe, and recipes whose engine options differ.
    """

    recipes: tuple[Recipe, ...]
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        kinds = (Recipe,) if self.layers is None else (ZipCache,)
        for recipe in self.recipes:
            if not isinstance(recipe, kinds) or isinstance(recipe, CachePlan):
                allowed = "a recipe such as ZipCache()" if self.layers is None else "ZipCache for its layers"
                raise WrongTypeError(f"a plan takes {allowed}, got a {type(recipe).__name__}")
        if self.layers is None:
            if len(self.recipes) != 1:
                raise TersorError(f"a plan of {len(self.recipes)} recipes needs layers=, the place of each in recipes")
            return
        places = all(type(each) is int and 0 <= each < len(self.recipes) for each in self.layers)
        if not self.layers or not places:
            raise TersorError(f"layers={self.layers!r} must be places in recipes, from 0 to {len(self.recipes) - 1}")
        for name in ENGINE_OPTIONS:
            given = list(dict.fromkeys(getattr(recipe, name) for recipe in self.recipes))
            if len(given) > 1:
                told = " and ".join(f"{name}={value!r}" for value in given)
                raise TersorError(f"the recipes of a plan have {told}; all layers work on the same tokens, give one")

    def choices(self) -> dict[str, str]:
        raise UnsupportedError(
            "a plan is a whole cache and cannot be composed; compose the recipes themselves, such as ZipCache() and "
            "MiniCache()"
        )

    def method(self) -> KVMethod:
        """The method of the one recipe, or the first one's with every layer by its own."""
        from dataclasses import replace

        from tersor.kv.depth.base import PlannedLayers

        methods = [recipe.method() for recipe in self.recipes]
        if self.layers is None:
            return methods[0]
        return replace(methods[0], name="plan", depth=PlannedLayers(tuple(methods[each] for each in self.layers)))

    def to_json(self) -> str:
        """The plan as one JSON object, a recipe a line."""
        lines = ",\n  ".join(recipe.to_named_json() for recipe in self.recipes)
        return f'{{"plan": {VERSION}, "layers": {json.dumps(self.layers)}, "recipes": [\n  {lines}\n]}}\n'

    def to_named_json(self) -> str:
        return self.to_json()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read `to_json` back.

        Raises:
            ValueError: For anything else, another version, and unknown methods or settings.
        """
        try:
            read = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            read = None
        if not isinstance(read, dict) or "plan" not in read:
            raise TersorError("this is no cache plan; `tersor tune` writes one")
        if read["plan"] != VERSION:
            raise TersorError(f"the plan is of version {read['plan']!r}, known is {VERSION}; make it anew: tersor tune")
        if set(read) != {"plan", "layers", "recipes"}:
            raise TersorError(f"a plan has the fields 'layers', 'plan' and 'recipes', this one has {sorted(read)}")
        layers, recipes = read["layers"], read["recipes"]
        if not isinstance(recipes, list) or not isinstance(layers, (list, type(None))):
            raise TersorError("in a plan, 'recipes' is a list, and 'layers' a list or null")
        return cls(recipes=tuple(map(recipe_named, recipes)), layers=None if layers is None else tuple(layers))


def read_plan(file: Path) -> CachePlan:
    """The plan in ``file``; raises `ValueError` that names the file."""
    if not file.is_file():
        raise TersorError(f"{file}: no such file")
    try:
        return CachePlan.from_json(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise TersorError(f"{file} is not UTF-8 text, and so no cache plan") from None
    except TersorError as error:
        raise TersorError(f"{file}: {error}") from error

"""Compositions: one method out of recipes that make different choices."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from tersor._errors import TersorError, WrongTypeError
from tersor.kv import get_method
from tersor.kv.engine.choices import ENGINE_OPTIONS
from tersor.kv.recipe import Recipe

if TYPE_CHECKING:
    from tersor.kv.method import KVMethod

CHOICES = ("selection", "storage", "depth", "prefill")


def compose(*recipes: Recipe) -> Composition:
    """One recipe out of several, in any order: each choice comes from the recipe that makes it.

    ``compose(ZipCache(), MiniCache())`` merges layers as MiniCache does and stores their directions as ZipCache does,
    with the tokens' bits chosen once a pair. A setting of the engine, such as ``streaming_gap``, that a recipe leaves
    at its default gives way to the other's.

    Example:
        >>> import tersor
        >>> tersor.compose(tersor.ZipCache(), tersor.MiniCache(gamma=0.1)).method().name
        'zipcache+minicache'

    Args:
        *recipes: At least two, each of another class.

    Raises:
        TypeError: For anything but recipes.
        ValueError: For recipes that contradict each other; the message names both and the setting.
    """
    return Composition(recipes)


@dataclass(frozen=True)
class Composition(Recipe):
    """What `compose` returns; the recipes must make different choices."""

    recipes: tuple[Recipe, ...]

    def __post_init__(self) -> None:
        for recipe in self.recipes:
            if not isinstance(recipe, Recipe) or isinstance(recipe, Composition):
                raise WrongTypeError(
                    f"compose takes recipes such as ZipCache() and MiniCache(), got a {type(recipe).__name__}; "
                    "to combine choices of your own, give them to tersor.kv.method.KVMethod"
                )
        if len(self.recipes) < 2:
            raise TersorError(f"compose needs at least two recipes, got {len(self.recipes)}; one runs by itself")
        names = [type(recipe).__name__ for recipe in self.recipes]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise TersorError(f"compose got {', '.join(repeated)} more than once; give every recipe once")
        self._owners()
        self._options()
        # Contradictions between the choices themselves show here, and not at the first prompt.
        self.method()

    def _owners(self) -> dict[str, Recipe]:
        """Which recipe makes each choice."""
        owners: dict[str, Recipe] = {}
        for recipe in self.recipes:
            for choice, by in recipe.choices().items():
                if choice in owners:
                    other = owners[choice]
                    raise TersorError(
                        f"{type(other).__name__} (by {other.choices()[choice]}) and {type(recipe).__name__} (by {by}) "
                        f"both choose the {choice}; leave it to one of them"
                    )
                owners[choice] = recipe
        return owners

    def _options(self) -> dict[str, Any]:
        """The engine's settings; one that is left at its default gives way."""
        options: dict[str, Any] = {}
        for name in ENGINE_OPTIONS:
            given = {
                type(recipe).__name__: own[name] for recipe in self.recipes if name in (own := recipe.engine_options())
            }
            if len(set(given.values())) > 1:
                told = " and ".join(f"{name}={value!r} by {who}" for who, value in given.items())
                raise TersorError(f"the composition is given {told}; both work on the same tokens, so give one value")
            for value in given.values():
                options[name] = value
        return options

    def choices(self) -> dict[str, str]:
        return {choice: recipe.choices()[choice] for choice, recipe in self._owners().items()}

    def method(self) -> KVMethod:
        """Each choice by the recipe that makes it, what none makes by the recipe that merges layers, or the first."""
        from tersor.kv.method import KVMethod

        owners = self._owners()
        methods = {id(recipe): recipe.method() for recipe in self.recipes}
        other = owners.get("depth", self.recipes[0])
        made = {choice: getattr(methods[id(owners.get(choice, other))], choice) for choice in CHOICES}
        # Named the same whatever the order: the recipe that stores comes first.
        ordered = sorted(self.recipes, key=lambda recipe: recipe is not owners.get("storage", other))
        name = "+".join(methods[id(recipe)].name for recipe in ordered)
        return KVMethod(name=name, **made, **self._options())

    def to_json(self) -> str:
        """The settings as one JSON object, by method."""
        settings = {recipe.method().name: asdict(recipe) for recipe in self.recipes}  # type: ignore[call-overload]
        return json.dumps(settings, sort_keys=True)

    def to_named_json(self) -> str:
        return self.to_json()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read `to_json` back; unknown methods and settings raise `ValueError`."""
        return cls(tuple(get_method(name).from_json(json.dumps(own)) for name, own in json.loads(text).items()))


def recipe_named(named: Any) -> Recipe:
    """The recipe whose settings stand under the name of its method, of a composition under several.

    Args:
        named: What `Recipe.to_named_json` wrote, read.

    Raises:
        ValueError: For anything else, and for unknown methods and settings.
    """
    if not isinstance(named, dict) or not named or not all(isinstance(each, dict) for each in named.values()):
        raise TersorError("a recipe is an object of settings by the name of their method")
    try:
        if len(named) > 1:
            return Composition.from_json(json.dumps(named))
        [(name, settings)] = named.items()
        return get_method(name).from_json(json.dumps(settings))
    except TypeError as error:  # an edited file: a word where a number belongs
        raise TersorError(f"a setting of {' and '.join(named)} is of another type ({error})") from error

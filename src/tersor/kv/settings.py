"""Recipes from text: ``zipcache+minicache`` with settings such as ``high_bits=8``, or a plan's file, as commands do."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tersor._errors import TersorError
from tersor.kv import METHODS, get_method
from tersor.kv.compose import compose, recipe_named
from tersor.kv.plan import CachePlan, read_plan
from tersor.kv.recipe import Recipe

_WORDS = {"true": True, "false": False, "none": None}


def recipe_from_text(cache: str, settings: Sequence[str]) -> Recipe | None:
    """The recipe called ``cache``, or the composition of several joined by '+', or a plan; None for 'none'.

    Args:
        cache: Names of `METHODS`, or a plan's file, which ends in ".json".
        settings: ``name=value`` each; given to every recipe that has a setting of this name.

    Raises:
        ValueError: For an unknown method, a setting that none of them has, and a value of another type.
    """
    if cache.endswith(".json"):
        if settings:
            raise TersorError(f"--set {settings[0]!r} does not go with a plan, which has all settings; leave it out")
        return read_plan(Path(cache).expanduser())
    names = [] if cache == "none" else cache.split("+")
    if not set(names) <= set(METHODS):
        raise TersorError(
            f"--cache {cache!r} is unknown; choose one of {['none', *sorted(METHODS)]}, several joined by '+', or "
            "the .json file of a plan"
        )
    classes = [get_method(name) for name in names]
    known = {name: hint for each in classes for name, hint in _hints(each).items()}
    given: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.replace("-", "_")
        if not equals:
            raise TersorError(f"--set {setting!r} must be name=value")
        if name not in known:
            offer = f"its settings are {', '.join(known)}" if known else "it has none"
            raise TersorError(f"--set {setting!r} is no setting of --cache {cache}; {offer}")
        if name in given:
            raise TersorError(f"--set {name} is given twice; give it once")
        given[name] = _value(name, text, known[name])
    try:
        recipes = [each(**{name: given[name] for name in given if name in _hints(each)}) for each in classes]
        return compose(*recipes) if len(recipes) > 1 else next(iter(recipes), None)
    except TersorError as error:
        # A recipe speaks of its arguments; here they are what was given to --set.
        typed = str(error).partition("=")[0] in known
        raise TersorError(f"--set {error}" if typed else f"--cache {cache}: {error}") from error


def recipe_from_json(text: str) -> Recipe:
    """The recipe that `Recipe.to_named_json` wrote; raises `ValueError` for an unknown method or setting."""
    named = json.loads(text)
    return CachePlan.from_json(text) if "plan" in named else recipe_named(named)


def _hints(recipe: type[Recipe]) -> dict[str, Any]:
    """Types of the settings of a recipe."""
    hints = get_type_hints(recipe)
    return {each.name: hints[each.name] for each in fields(recipe)}  # type: ignore[arg-type]


def _value(name: str, text: str, hint: Any) -> Any:
    """``text`` as a value of the type ``hint``; a single entry of a tuple needs no comma."""
    try:
        value = _WORDS[text.lower()] if text.lower() in _WORDS else ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    for each in (text, value, (value,)):
        if _fits(each, hint):
            return each
    raise TersorError(f"--set {name}={text} must be {_name(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in parts
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            return all(_fits(each, parts[0]) for each in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, hint)


def _name(hint: Any) -> str:
    """A type in the words of a message."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_name, get_args(hint)))
    words = {int: "a whole number", float: "a number", bool: "true or false", type(None): "none"}
    return words.get(hint, "numbers with commas between them")

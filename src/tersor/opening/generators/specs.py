"""Generators by their text, such as ``gold`` or ``scripted:strong``."""

from __future__ import annotations

from tersor._errors import TersorError
from tersor.opening.generators.base import InterleavedGenerator
from tersor.opening.generators.scripted import LADDER, GoldGenerator


def generator_of(text: str) -> InterleavedGenerator:
    """The generator that a text names.

    Raises:
        TersorError: If it names none.
    """
    kind, _, name = text.partition(":")
    ladder = {each.name: each for each in LADDER}
    if text == "gold":
        return GoldGenerator()
    if kind == "scripted" and name in ladder:
        return ladder[name]
    raise TersorError(f"--model {text!r} must be gold, or scripted: with one of {', '.join(ladder)}")

"""Whether an answer is right: rules that need no model (section 2.8)."""

from __future__ import annotations

import functools
import importlib
import math
import re
import string
from collections.abc import Callable
from typing import Any

from tersor._errors import TersorError

#: From an answer's text and the wanted one to a score in [0, 1], or None where it cannot be judged. Of a list of wanted
#: answers any will do.
Verifier = Callable[[str, Any], float | None]

_NUMBER = re.compile(r"-?(?:\d+(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?")
_STATED = re.compile(r"answer\s*(?:is|:|=)?\s*[\(\[\*]*([A-Za-z])(?![A-Za-z])", re.IGNORECASE)
_LEADING = re.compile(r"^[\(\[\*\s]*([A-Za-z])(?![A-Za-z'])")
_BRACKETED = re.compile(r"[\(\[]([A-Za-z])[\)\]]")


def exact_match(completion: str, answer: Any) -> float:
    """1 where the texts are equal but for case, spaces, and punctuation at the ends."""
    return float(any(_plain(completion) == _plain(each) for each in _wanted(answer)))


def multiple_choice(completion: str, answer: Any) -> float:
    """1 where the chosen letter is the wanted one.

    The letter is what "answer is" or "answer:" names last, else one in front ("B. a cat"), else the only one in
    brackets. A text that names none is wrong.
    """
    stated = _STATED.findall(completion)
    leading = _LEADING.match(completion)
    bracketed = set(map(str.upper, _BRACKETED.findall(completion)))
    if stated:
        letter = stated[-1]
    elif leading:
        letter = leading[1]
    else:
        letter = bracketed.pop() if len(bracketed) == 1 else ""
    return float(letter != "" and any(letter.upper() == each.strip().strip("().").upper() for each in _wanted(answer)))


def number(completion: str, answer: Any, *, tolerance: float = 1e-6) -> float | None:
    """1 where the text's last number is the wanted one, up to a share ``tolerance``; None if no number is wanted."""
    wanted, said = [_numbers(each) for each in _wanted(answer)], _numbers(completion)
    if not all(wanted):
        return None
    near = (math.isclose(said[-1], each[-1], rel_tol=tolerance, abs_tol=1e-12) for each in wanted if said)
    return float(any(near))


#: Name on the command line -> verifier.
VERIFIERS: dict[str, Verifier] = {"exact": exact_match, "choice": multiple_choice, "number": number}


def find_verifier(name: str) -> Verifier:
    """The verifier of a name: one of `VERIFIERS`, ``number:0.05`` for a tolerance, or ``module:function`` of your own.

    Raises:
        ValueError: If there is none of that name.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]
    first, _, second = name.partition(":")
    if first == "number":
        try:
            tolerance = float(second)
        except ValueError:
            tolerance = -1.0
        if not 0.0 <= tolerance < 1.0:
            raise TersorError(f"verifier={name!r} needs a tolerance from 0 to below 1, such as number:0.05")
        return functools.partial(number, tolerance=tolerance)
    try:
        found: Any = getattr(importlib.import_module(first), second)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not second or not callable(found):
        raise TersorError(f"verifier={name!r} must be one of {[*VERIFIERS]}, number:TOLERANCE, or module:function")
    verifier: Verifier = found
    return verifier


def _wanted(answer: Any) -> list[str]:
    return [str(each) for each in answer] if isinstance(answer, (list, tuple)) else [str(answer)]


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(string.punctuation + " ")


def _numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in _NUMBER.findall(text) if re.search(r"\d", found)]

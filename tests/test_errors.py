"""One family of refusals, which users may catch by the name that fits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tersor
from tersor._errors import TersorError, UnsupportedError, WrongTypeError


def test_refusals_are_also_what_the_library_calls_them() -> None:
    assert tersor.TersorError is TersorError
    assert issubclass(TersorError, ValueError)
    assert issubclass(UnsupportedError, (TersorError, NotImplementedError))
    assert issubclass(WrongTypeError, (TersorError, TypeError))


def test_the_source_refuses_by_no_other_name() -> None:
    source = Path(tersor.__file__).parent
    plain = re.compile(r"raise (ValueError|TypeError|NotImplementedError)\(")
    assert [str(file) for file in source.rglob("*.py") if plain.search(file.read_text(encoding="utf-8"))] == []


def test_a_recipe_refuses_by_it() -> None:
    with pytest.raises(TersorError, match="high_bits"):
        tersor.ZipCache(high_bits=5)

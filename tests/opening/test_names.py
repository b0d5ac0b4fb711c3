from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import tersor.opening as opening


@pytest.mark.parametrize("name", opening.__all__)
def test_every_name_of_the_room_resolves_to_what_its_home_defines(name: str) -> None:
    value = getattr(opening, name)
    assert value is getattr(importlib.import_module(value.__module__), name) and name in dir(opening)


def test_no_name_is_also_that_of_a_file() -> None:
    modules = {name.rpartition(".")[2] for name in sys.modules if name.startswith("tersor.opening.")}
    assert not modules & set(opening.__all__), "importing the file would hide the name"


def test_naming_the_room_loads_nothing_heavy() -> None:
    code = "import sys, tersor.opening; assert not {'torch', 'numpy', 'scipy', 'PIL', 'sqlite3'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

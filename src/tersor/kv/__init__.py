"""The KV engine: a method is a selection, a storage, a depth and a prefill.

`METHODS` lists the recipes by the name that the command line uses; a new method is one file and one row.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tersor._errors import TersorError

if TYPE_CHECKING:
    from tersor.kv.recipe import Recipe

#: Name -> "module:class" of each recipe; modules load on first use.
METHODS: dict[str, str] = {
    "zipcache": "tersor.kv.zipcache:ZipCache",
    "minicache": "tersor.kv.minicache:MiniCache",
    "zipvl": "tersor.kv.zipvl:ZipVL",
}


def get_method(name: str) -> type[Recipe]:
    """The recipe class registered as ``name``; raises `ValueError` for an unknown one."""
    if name not in METHODS:
        raise TersorError(f"cache method {name!r} is unknown; choose one of {sorted(METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    recipe: type[Recipe] = getattr(import_module(module), attribute)
    return recipe

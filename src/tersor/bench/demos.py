"""The registry of `tersor demo`: one row a system, each loaded when it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from tersor.bench.records import Record
from tersor.bench.report import Section

#: System -> "module:function"; the function takes a progress callback and returns a `DemoResult`.
DEMOS: dict[str, str] = {
    "zipcache": "tersor.kv.demos.zipcache:run",
    "minicache": "tersor.kv.demos.minicache:run",
    "zipar": "tersor.grids.zipar.demo:run",
    "nar": "tersor.grids.nar.demo:run",
    "zipvl": "tersor.kv.demos.zipvl:run",
    "ptq": "tersor.ptq.demo:run",
    "meswitch": "tersor.experts.demo:run",
}


@dataclass(frozen=True)
class DemoResult:
    """What one system contributes: its scoreboard records and its section of the report."""

    records: list[Record]
    section: Section


def get_demo(system: str) -> Callable[[Callable[[str], None]], DemoResult]:
    """The demo of ``system``; raises `ValueError` for an unknown one."""
    if system not in DEMOS:
        raise ValueError(f"--only {system!r} is no system of the demo; choose one of {sorted(DEMOS)}")
    module, _, name = DEMOS[system].partition(":")
    function: Callable[[Callable[[str], None]], DemoResult] = getattr(import_module(module), name)
    return function

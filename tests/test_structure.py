"""The house: imports point down, modules go in no circle, and files stay short, whichever way an import is written."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
#: Floors from the top; rooms on the same floor know nothing of each other. The root package lists all rooms.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("rl", "experts", "opening"),
    ("kv", "grids", "ptq", "drag"),
    ("zoo",),
    ("lowbit", "bench", "training", "web"),
    ("_atomic", "_compat", "_console", "_errors", "_images", "_lazy", "_options", "_weights"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SCREWS = set(FLOORS[-1])


def modules(source: Path) -> dict[str, Path]:
    """Every module below ``source`` by its dotted name; a package goes by its own."""
    found = {}
    for file in sorted(source.rglob("*.py")):
        parts = file.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def named(text: str, known: set[str]) -> str | None:
    """The module that a dotted path names, itself or by one of its members."""
    path = text.partition(":")[0]
    while path and path not in known:
        path = path.rpartition(".")[0]
    return path or None


def imports(file: Path, known: set[str]) -> Iterator[str]:
    """What a file imports at any depth, for types alone too, and every module that one of its strings names."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            targets = [node.value] if re.fullmatch(r"tersor(\.\w+)+(:\w+)?", node.value) else []
        else:
            continue
        yield from (module for target in targets if (module := named(target, known)) is not None)


def graph(source: Path) -> dict[str, set[str]]:
    """Module -> the modules that it names, without itself and the root package."""
    files = modules(source)
    known = set(files)
    return {name: set(imports(file, known)) - {name, "tersor"} for name, file in files.items() if name != "tersor"}


def room(module: str) -> str:
    return module.split(".")[1]


def wrong_arrows(found: dict[str, set[str]]) -> list[str]:
    """Imports that point up, or to a neighbour on the same floor."""
    return [
        f"{module} -> {target}"
        for module, targets in found.items()
        for target in sorted(targets)
        if room(module) != room(target)
        and not {room(module), room(target)} <= SCREWS
        and FLOOR[room(module)] >= FLOOR[room(target)]
    ]


def circle(found: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, in order; empty where there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(found.get(module, ())):
            if loop := walk(target, [*path, module]):
                return loop
        done.add(module)
        return []

    return next((loop for module in found if (loop := walk(module, []))), [])


def siblings(found: dict[str, set[str]], package: str) -> dict[str, set[str]]:
    """The imports among the direct children of a package, each with all that is below it."""

    def child(module: str) -> str | None:
        below = module.removeprefix(f"{package}.")
        return None if below == module else f"{package}.{below.partition('.')[0]}"

    collapsed: dict[str, set[str]] = {}
    for module, targets in found.items():
        if (own := child(module)) is not None:
            others = {other for target in targets if (other := child(target)) not in (None, own)}
            collapsed.setdefault(own, set()).update(others)
    return collapsed


def test_imports_point_down_however_they_are_written() -> None:
    assert wrong_arrows(graph(SOURCE)) == []


def test_modules_and_folders_go_in_no_circle() -> None:
    found = graph(SOURCE)
    assert circle(found) == []
    packages = {module.rpartition(".")[0] for module in found}
    assert {package: loop for package in packages if (loop := circle(siblings(found, package)))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from tersor.kv.zipcache import ZipCache",
        "from tersor.kv import zipcache",
        "def late():\n    import tersor.kv.zipcache",
        "if TYPE_CHECKING:\n    from tersor.kv.zipcache import ZipCache",
        "import_module('tersor.kv.zipcache')",
        "HOME = {'ZipCache': 'tersor.kv.zipcache:ZipCache'}",
    ],
)
def test_an_arrow_that_points_up_is_seen(tmp_path: Path, line: str) -> None:
    for name, text in {"kv/__init__": "", "kv/zipcache": "", "zoo/__init__": line}.items():
        file = tmp_path / "tersor" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert wrong_arrows(graph(tmp_path)) == ["tersor.zoo -> tersor.kv.zipcache"]


def test_a_circle_of_files_or_folders_is_seen() -> None:
    folders = {"tersor.a.one": {"tersor.b.one"}, "tersor.b.two": {"tersor.a.two"}}
    assert circle(folders) == [] != circle(siblings(folders, "tersor"))
    assert circle({"tersor.a": {"tersor.b"}, "tersor.b": {"tersor.c"}, "tersor.c": {"tersor.b"}}) == [
        "tersor.b", "tersor.c", "tersor.b",
    ]  # fmt: skip


def test_measurements_are_for_commands_and_demos_alone() -> None:
    def may(module: str) -> bool:
        return ".bench" in module or module == "tersor.cli" or module.split(".")[-1] == "demo" or ".demos." in module

    intruders = [
        f"{module} -> {target}"
        for module, targets in graph(SOURCE).items()
        for target in targets
        if ".bench" in target and not target.startswith("tersor.bench") and not may(module)
    ]
    assert intruders == []


def test_files_are_short() -> None:
    lengths = {name: file.read_text(encoding="utf-8").count("\n") for name, file in modules(SOURCE).items()}
    assert max(lengths.values()) <= 450
    assert statistics.median(lengths.values()) <= 150

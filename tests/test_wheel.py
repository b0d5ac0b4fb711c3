import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "tersor"


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(tmp_path):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("tersor-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    source = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "tersor/py.typed" in source and "tersor/bench/templates/report.html" in source
    assert any(name.endswith("model.safetensors") for name in source), "the zoo has no checkpoint"
    assert source <= packed
    assert not {name for name in packed if name.startswith(("tests/", "recipes/"))}


def test_the_source_archive_holds_every_path_that_the_makefile_and_the_tests_name(tmp_path):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path], cwd=ROOT, check=True)
    (archive,) = tmp_path.glob("tersor-*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    folders = {part.as_posix() for name in names for part in Path(name).parents} | names
    words = set(re.findall(r"[\w./-]+", (ROOT / "Makefile").read_text()))
    assert {"tests_timm", "constraints.txt", "pyproject.toml", ".ci/releases.py"} <= words
    named = {word for word in words if word[0] not in "./" or word.startswith(".ci/")}
    made = {"site", "dist", "build", "tersor-report"}  # what `make clean` takes away
    assert {word for word in named - made if (ROOT / word).exists()} <= folders
    roots = {"tests", "tests_timm", "src", "recipes", "examples", "benchmarks", "docs"}
    source = {
        path.relative_to(ROOT).as_posix()
        for root in roots
        for path in (ROOT / root).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".partial"
    }
    assert source <= names and {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "mkdocs.yml"} <= names

import subprocess
import sys
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

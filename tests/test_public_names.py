import importlib.metadata
import json
import subprocess
import sys

import pytest

import tersor

# Uses the process's own CPU time: wall time would measure the other test worker too.
_IMPORT_AND_TELL = """
import json, sys, time
start = time.process_time()
import tersor
print(json.dumps({"seconds": time.process_time() - start, "modules": sorted(sys.modules)}))
"""


@pytest.mark.parametrize("name", tersor.__all__)
def test_every_public_name_resolves_and_is_listed(name):
    value = getattr(tersor, name)
    assert value is getattr(tersor, name), "a name must always give the same object"
    assert name in dir(tersor)


def test_names_are_sorted_and_each_is_known_to_the_lazy_table():
    assert sorted(tersor.__all__) == tersor.__all__
    assert {*tersor._MEMBERS, "zoo", "__version__"} == set(tersor.__all__)


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match=r"'ZipCash'; it offers .*ZipCache"):
        tersor.ZipCash  # noqa: B018


def test_importing_is_fast_and_loads_nothing_heavy():
    # The best of three: the first may have to compile bytecode.
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", _IMPORT_AND_TELL], capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(run["seconds"] for run in runs) < 0.3
    assert not {"torch", "transformers", "numpy", "rich", "typer"} & set(runs[0]["modules"])


def test_the_version_is_the_installed_one():
    assert importlib.metadata.version("tersor") == tersor.__version__

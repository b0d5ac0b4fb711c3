import re
import shlex
import sys
from importlib import metadata

import pytest

from tersor._lazy import MissingExtraError, advice, installed, require


def test_an_installed_module_is_returned():
    assert require("json.decoder", "bench") is sys.modules["json.decoder"]


@pytest.mark.parametrize(
    ("extra", "packages"), [("bench", {"matplotlib", "optimum-quanto"}), ("train", {"accelerate"})]
)
def test_a_missing_module_names_a_command_that_works_without_an_index_of_ours(extra, packages):
    with pytest.raises(MissingExtraError) as caught:
        require("tersor_needs_nothing_of_this_name", extra)
    message, command = str(caught.value), str(caught.value).partition("pip install ")[2]
    assert message.startswith("tersor_needs_nothing_of_this_name is missing") and "\n" not in message
    assert {re.split("[<>=]", each)[0] for each in shlex.split(command)} == packages
    assert isinstance(caught.value, ImportError)


def test_without_an_installed_tersor_the_module_itself_is_named(monkeypatch):
    def none(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", none)
    assert advice("some.module", "bench").endswith("pip install some")


def test_what_is_installed_is_found_without_importing_it():
    assert installed("json.tool") and "json.tool" not in sys.modules
    assert not installed("tersor_absent") and not installed("tersor_absent.part")


def test_a_missing_dependency_of_the_module_is_named(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import tersor_absent_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match="tersor_absent_dependency is missing"):
        require("half_installed", "bench")


def test_a_broken_module_keeps_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "broken_on_import.py").write_text("raise ImportError('wrong build')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="wrong build") as caught:
        require("broken_on_import", "bench")
    assert not isinstance(caught.value, MissingExtraError)

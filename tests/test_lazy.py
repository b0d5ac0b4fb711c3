import sys

import pytest

from tersor._lazy import MissingExtraError, require


def test_an_installed_module_is_returned():
    assert require("json.decoder", "bench") is sys.modules["json.decoder"]


def test_a_missing_module_names_the_command_in_one_line():
    with pytest.raises(MissingExtraError) as caught:
        require("tersor_needs_nothing_of_this_name", "bench")
    message = str(caught.value)
    assert "pip install 'tersor[bench]'" in message
    assert "tersor_needs_nothing_of_this_name" in message
    assert "\n" not in message
    assert isinstance(caught.value, ImportError)


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

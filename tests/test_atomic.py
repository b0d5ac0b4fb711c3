import os
import stat

import pytest

from tersor import _atomic


def test_it_creates_folders_and_replaces(tmp_path):
    path = tmp_path / "deep" / "er" / "file.txt"
    _atomic.write_text(path, "one")
    _atomic.write_text(path, "två")
    assert path.read_text(encoding="utf-8") == "två"
    assert os.listdir(path.parent) == ["file.txt"]
    _atomic.write_bytes(path, b"\r\n\0")
    assert path.read_bytes() == b"\r\n\0"


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def refuse(*_):
        raise OSError("disk says no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk says no"):
        _atomic.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_the_file_has_ordinary_permissions(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    _atomic.write_text(tmp_path / "atomic", "")
    assert stat.S_IMODE(os.stat(tmp_path / "atomic").st_mode) == stat.S_IMODE(os.stat(ordinary).st_mode)

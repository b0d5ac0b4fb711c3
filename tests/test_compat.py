"""Releases of libraries that are too old or too new are refused, with the command that helps."""

from __future__ import annotations

import re

import pytest

from tersor import _compat


def install(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    """Pretend that this release of transformers is installed."""
    monkeypatch.setattr(_compat, "version", {"transformers": release}.__getitem__)


@pytest.mark.parametrize("release", ["5.20.0", "5.29.3", "5.25.0.dev0"])
def test_tested_releases_pass(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    install(monkeypatch, release)
    _compat.check_transformers()


@pytest.mark.parametrize("release", ["5.19.9", "4.57.1", "5.30.0", "5.100.0", "6.0"])
def test_other_releases_name_the_command(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    install(monkeypatch, release)
    wanted = f"tersor needs transformers >=5.20,<5.30, found {release}: pip install 'transformers>=5.20,<5.30'"
    with pytest.raises(ImportError, match=f"^{re.escape(wanted)}$"):
        _compat.check_transformers()


@pytest.mark.parametrize("release", ["5.22.9", "5.24.0", "6.23.0"])
def test_continuous_batching_is_for_one_release(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    install(monkeypatch, "5.23.4")
    _compat.check_continuous_batching()
    install(monkeypatch, release)
    with pytest.raises(ImportError, match=rf"need transformers 5\.23, found {re.escape(release)}: .*~=5\.23\.0'"):
        _compat.check_continuous_batching()


def test_the_installed_release_passes() -> None:
    _compat.check_transformers()

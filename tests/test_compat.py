"""Releases of libraries that are too old or too new are refused, with the command that helps."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tersor import _compat

ROOT = Path(__file__).parents[1]
MAJOR, FIRST = _compat.TRANSFORMERS_MINIMUM
_, BELOW = _compat.TRANSFORMERS_BELOW
RANGE = f">={MAJOR}.{FIRST},<{MAJOR}.{BELOW}"


def install(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    """Pretend that this release of transformers is installed."""
    monkeypatch.setattr(_compat, "version", {"transformers": release}.__getitem__)


@pytest.mark.parametrize(
    "release", [f"{MAJOR}.{FIRST}.0", f"{MAJOR}.{FIRST}", f"{MAJOR}.{BELOW - 1}.13", f"{MAJOR}.{BELOW - 1}.0.dev0"]
)
def test_tested_releases_pass(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    install(monkeypatch, release)
    _compat.check_transformers()


@pytest.mark.parametrize(
    "release",
    [
        f"{MAJOR}.{FIRST - 1}.9",
        f"{MAJOR - 1}.{FIRST}.1",
        f"{MAJOR}.{BELOW}.0",
        f"{MAJOR}.{BELOW}.0.dev0",
        f"{MAJOR}.100.0",
        f"{MAJOR + 1}.0",
        f"{MAJOR + 1}.{FIRST}.0",
    ],
)
def test_other_releases_name_the_command(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    install(monkeypatch, release)
    wanted = f"tersor needs transformers {RANGE}, found {release}: pip install 'transformers{RANGE}'"
    with pytest.raises(ImportError, match=f"^{re.escape(wanted)}$"):
        _compat.check_transformers()


def test_the_package_asks_for_the_range_and_the_newest_release_of_it_is_pinned() -> None:
    assert f'"transformers{RANGE}"' in (ROOT / "pyproject.toml").read_text()
    assert f"\ntransformers=={MAJOR}.{BELOW - 1}." in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("name", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
@pytest.mark.parametrize(("options", "expected"), [({}, None), ({"use_reentrant": False}, {"use_reentrant": False})])
def test_activations_are_checkpointed_under_either_name(name: str, options: dict, expected: dict | None) -> None:
    asked: list[dict | None] = []
    _compat.checkpoint_activations(SimpleNamespace(**{name: asked.append}), **options)
    assert asked == [expected]


def test_the_installed_release_passes() -> None:
    _compat.check_transformers()

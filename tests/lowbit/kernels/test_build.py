"""Building the C kernels: cached, atomic, and plain torch instead where there is no compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tersor.lowbit.kernels import KERNELS, _build, chosen_backend, unavailable_reason
from tersor.lowbit.kernels._build import NoCompilerError, load_library

SOURCE = "int answer(void) { return 42; }\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TERSOR_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "answer" / "cpu.c"
    path.parent.mkdir()
    path.write_text(SOURCE)
    load_library.cache_clear()
    yield path
    load_library.cache_clear()


def test_a_library_is_built_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_library(source).answer() == 42
    (built,) = (source.parent.parent / "cache").iterdir()
    load_library.cache_clear()
    monkeypatch.setattr(_build, "_build", lambda *_: pytest.fail("built again"))
    assert load_library(source).answer() == 42
    assert built.exists()


def test_another_source_is_another_library(source: Path) -> None:
    assert load_library(source).answer() == 42
    source.write_text(SOURCE.replace("42", "43"))
    load_library.cache_clear()
    assert load_library(source).answer() == 43
    assert len(list((source.parent.parent / "cache").iterdir())) == 2


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(source: Path) -> None:
    source.write_text("this is not C")
    with pytest.raises(NoCompilerError, match="error"):
        load_library(source)
    assert not list((source.parent.parent / "cache").iterdir())


def test_no_compiler_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(NoCompilerError, match="no-such-compiler"):
        load_library(source)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    load_library.cache_clear()
    with pytest.raises(NoCompilerError, match="no C compiler"):
        load_library(source)


def test_a_cache_that_cannot_be_written_is_no_crash(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSOR_CACHE", str(source))  # a file, not a folder
    with pytest.raises(NoCompilerError, match="cannot build or load"):
        load_library(source)


def test_every_kernel_of_ours_builds_here() -> None:
    for operation in KERNELS:
        assert unavailable_reason(operation, "cpu") is None
        assert chosen_backend(operation) == "cpu"
        assert chosen_backend(operation, "meta") == "reference"


def test_without_a_compiler_everything_still_runs(tmp_path: Path) -> None:
    """A process of its own, because kernels are chosen once."""
    program = """
import json, torch
from tersor.cli import run
from tersor.lowbit.codecs import encode_keys_channelwise
from tersor.lowbit.kernels import chosen_backend
codes = encode_keys_channelwise(torch.arange(24.0).reshape(1, 1, 3, 8), 4)
assert run(["env", "--json"]) == 0
print(json.dumps([chosen_backend("packed_attention"), codes.codes.flatten().tolist()]))
"""
    environment = os.environ | {"CC": "no-such-compiler", "TERSOR_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    facts, (backend, codes) = map(json.loads, done.stdout.splitlines())
    assert backend == "reference"
    assert "no-such-compiler" in facts["kernels"]["packed_attention"]
    from tersor.lowbit.codecs import encode_keys_channelwise

    assert codes == encode_keys_channelwise(torch.arange(24.0).reshape(1, 1, 3, 8), 4).codes.flatten().tolist()


def test_another_shared_header_is_another_library(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C sources include it, so a library that was built with the old one must not be found."""
    assert load_library(source).answer() == 42
    changed = source.with_name("common.h")
    changed.write_text("/* changed */")
    monkeypatch.setattr(_build, "COMMON", changed)
    load_library.cache_clear()
    assert load_library(source).answer() == 42
    assert len(list((source.parent.parent / "cache").iterdir())) == 2

"""The README's commands in processes of their own, with the time limits that users feel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

TERSOR = [str(Path(sys.executable).with_name("tersor"))]


def tersor(*arguments: str, **kwargs) -> tuple[subprocess.CompletedProcess[str], float]:
    start = time.perf_counter()
    done = subprocess.run([*TERSOR, *arguments], capture_output=True, text=True, check=False, timeout=200, **kwargs)
    return done, time.perf_counter() - start


@pytest.mark.parametrize("kind", ["missing", "corrupt", "wrong class", "impossible option"])
def test_bad_checkpoints_fail_within_two_seconds(kind: str, tmp_path: Path) -> None:
    from tersor import zoo

    folder = tmp_path / "checkpoint"
    shutil.copytree(zoo.path("tiny-lm"), folder)
    arguments = ["--model", str(folder)]
    if kind == "missing":
        shutil.rmtree(folder)
    elif kind == "corrupt":
        (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    elif kind == "wrong class":
        config = (folder / "config.json").read_text().replace("LlamaForCausalLM", "LlamaForSequenceClassification")
        (folder / "config.json").write_text(config)
    else:
        arguments += ["--set", "high_bits=5"]
    done, seconds = tersor("generate", *arguments, "hello")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert seconds < 2.0


def test_generate_reads_standard_input() -> None:
    done, _ = tersor("generate", "--max-new-tokens", "5", input="The captain went down to the ")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.rstrip("\n")) <= 5
    assert "tokens cached in" in done.stderr


def test_help_is_quick() -> None:
    done, seconds = tersor("--help")
    assert done.returncode == 0
    assert "generate" in done.stdout
    assert seconds < 2.0

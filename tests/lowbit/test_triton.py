"""What the interpreter cannot show: that the kernels compile for a GPU, and that nothing loads Triton too early."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tersor.lowbit.kernels import triton_runtime

needs_triton = pytest.mark.skipif(not triton_runtime.available("cpu"), reason="Triton has no build for this platform")


def run(*arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
def test_kernels_compile_for_a_gpu() -> None:
    compiled = Counter(run(str(Path(__file__).with_name("compile_for_gpu.py"))).split())
    # Raw tokens, every width and the window, with and without masks and factors; one plane a launch, two for 3 bits;
    # deltas of every width in two precisions.
    # Probes in every precision: plain, masked, with known sums.
    assert compiled == {
        **{"_attend": 12, "_merge": 2, "_row_lse": 2, "_column_sums": 3},
        **{"_quantize_pack_kernel": 6, "_delta_linear_kernel": 10},
    }


def test_importing_the_kernels_does_not_import_triton() -> None:
    code = """
import sys
from tersor.lowbit.kernels import packed_attention, quantize_pack, triton_runtime
print("triton" in sys.modules, triton_runtime.available("cpu"))
"""
    assert run("-c", code).split() == ["False", "False"]


@needs_triton
def test_the_interpreter_or_a_gpu_makes_it_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_runtime.available("cpu")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not triton_runtime.available("cpu")
    assert triton_runtime.available("cuda:0")
    monkeypatch.setattr(triton_runtime, "installed", lambda name: False)
    assert not triton_runtime.available("cuda:0")

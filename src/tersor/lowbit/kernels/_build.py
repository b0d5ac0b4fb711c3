"""Build a C source of ours with the system's compiler, once a machine, and load it.

Plain C builds in seconds where a torch extension takes a minute, because no torch header is read; ctypes hands over
pointers. Libraries are kept in ``$TERSOR_CACHE`` (else ``$XDG_CACHE_HOME/tersor``, else ``~/.cache/tersor``) under a
name made from sources, compiler, flags and processor, so that a shared home directory is safe.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

#: What the C sources include.
COMMON = Path(__file__).with_name("common.h")
#: Types that the C sources read, and the numbers that they know them by.
FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Linked against the same OpenMP as torch, whose worker threads it then shares. `-march=native` is what makes it fast.
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno")


class NoCompilerError(RuntimeError):
    """There is no C compiler, or it cannot build our kernels; callers fall back to plain torch."""


def compiler() -> str:
    """The C compiler: ``$CC``, or the first of cc, gcc and clang. Raises `NoCompilerError`."""
    named = os.environ.get("CC")
    for name in (named,) if named else ("cc", "gcc", "clang"):
        if name and (path := shutil.which(name)):
            return path
    raise NoCompilerError(f"CC={named} is not a program" if named else "no C compiler found (cc, gcc or clang)")


def cache_folder() -> Path:
    """Where built libraries are kept."""
    if own := os.environ.get("TERSOR_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tersor"


@cache
def load_library(source: Path, *extra_flags: str) -> ctypes.CDLL:
    """Build (or find) and load the library of one C file; a failure is remembered for the life of the process.

    Raises:
        NoCompilerError: If it cannot be built; the message is the compiler's first line.
    """
    command = [compiler(), *FLAGS, *extra_flags]
    key = hashlib.sha256()
    code = source.read_bytes() + COMMON.read_bytes()
    for part in (code, " ".join(command).encode(), _compiler_version(command[0]), _processor()):
        key.update(hashlib.sha256(part).digest())
    folder = cache_folder()
    target = folder / f"{source.parent.name}-{key.hexdigest()[:20]}.so"
    try:
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _build(command, source, target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise NoCompilerError(f"cannot build or load {target}: {error}") from error


def _build(command: list[str], source: Path, target: Path) -> None:
    """Compile next to the target and move into place, so that two processes never see half a file."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        run = subprocess.run([*command, str(source), "-o", str(built), "-lm"], capture_output=True, text=True)
        if run.returncode:
            complaint = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr.strip()[:200])
            raise NoCompilerError(f"{command[0]} cannot build {source.name}: {complaint}")
        os.replace(built, target)


def _compiler_version(path: str) -> bytes:
    return subprocess.run([path, "--version"], capture_output=True).stdout


def _processor() -> bytes:
    """What ``-march=native`` depends on: the instruction sets of this processor."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line.encode()
    return f"{platform.machine()} {platform.processor()}".encode()

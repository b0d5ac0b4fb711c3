"""Make the tables and pictures of the docs from committed records: no figure in them is typed by hand.

    python benchmarks/tables.py

reads ``benchmarks/results/*.jsonl`` (each written by the command that its records name) and writes
``docs/tables/*.md``, ``docs/assets/*.svg`` and the parts of README and ``docs/index.md`` that stand between markers. A
test compares the result with what is committed.
"""

from __future__ import annotations

from pathlib import Path

from pages import (
    drag,
    experts,
    front,
    intjudge,
    kv,
    merging,
    nar,
    opening,
    ptq,
    speculative,
    speed,
    tune,
    vlm,
    zipar,
    zipr1,
)
from pages.shared import ROOT

from tersor import _atomic

PAGES = (front, drag, experts, intjudge, kv, merging, nar, opening, ptq, speculative, speed, tune, vlm, zipar, zipr1)


def build() -> dict[Path, str]:
    """Every generated file of the docs with its text."""
    files: dict[Path, str] = {}
    for page in PAGES:
        files |= page.build()
    return files


if __name__ == "__main__":
    for path, text in build().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        _atomic.write_text(path, text)
        print(path.relative_to(ROOT))

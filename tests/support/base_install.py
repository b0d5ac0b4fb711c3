"""A process in which the packages of all extras cannot be found, as after an installation of tersor alone."""

from __future__ import annotations

import sys
from typing import Any

EXTRAS = frozenset(
    ("PIL", "accelerate", "diffusers", "hqq", "matplotlib", "onnx", "onnxruntime", "onnxscript", "optimum", "timm")
)


class Without:
    """A finder that does not find ``EXTRAS``."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(self, name: str, *rest: Any) -> Any:
        return None if name.partition(".")[0] in EXTRAS else self.finder.find_spec(name, *rest)


def hide() -> None:
    """From now on; to be called before anything else is imported."""
    assert not EXTRAS & set(sys.modules)
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

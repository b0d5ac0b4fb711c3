"""What a router is made of: its settings, and what each kind of router must know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from tersor._errors import TersorError
from tersor.experts.bank import is_name

ROUTER_FILE = "router.json"
FORMAT_VERSION = 1
KINDS = ("llm", "encoder", "embedding", "rules")

#: A text, or a conversation of ``{"role": ..., "content": ...}``.
Messages = str | Sequence[Mapping[str, Any]]


class Scorer(Protocol):
    """What a kind of router has to know."""

    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """Float32 ``[len(texts), experts]``, rows that add up to one, in the order of the router's experts."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """What ``router.json`` says.

    Raises:
        ValueError: If a setting is out of range.
    """

    kind: str
    """One of `KINDS`."""
    experts: Mapping[str, str]
    """What each expert is for, in one line, by name; at least two."""
    threshold: float = 0.0
    """A request whose likeliest expert is less likely than this goes to ``fallback``."""
    fallback: str | None = None
    """An expert's name, or None for the base."""
    sticky: bool = True
    """Whether a conversation stays with the expert of its first request."""
    max_tokens: int = 512
    """Tokens that the router reads; of longer requests the end."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TersorError(f"router kind {self.kind!r} is not possible; choose one of {KINDS}")
        if len(self.experts) < 2:
            raise TersorError(f"a router chooses among at least two experts, got {list(self.experts)}")
        for name, what in self.experts.items():
            if not is_name(name) or not isinstance(what, str) or not what.strip() or "\n" in what:
                raise TersorError(f"expert {name!r} needs a plain name and a description of one line, got {what!r}")
        if not 0 <= self.threshold <= 1:
            raise TersorError(f"threshold={self.threshold!r} must be a probability from 0 to 1")
        if self.fallback is not None and not is_name(self.fallback):
            raise TersorError(f"fallback={self.fallback!r} is no name of an expert")
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 8:
            raise TersorError(f"max_tokens={self.max_tokens!r} must be an integer of at least 8")


def read_router_config(folder: Path) -> RouterConfig:
    """What a router's folder says of itself; raises as `Router.from_pretrained` does."""
    file = folder / ROUTER_FILE
    if not file.is_file():
        raise TersorError(f"{folder}: no {ROUTER_FILE}; give the folder that `tersor experts router train` wrote")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        version = values.pop("format_version")
        if version == FORMAT_VERSION:
            return RouterConfig(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TersorError(f"{file} describes no router: {error}") from None
    raise TersorError(f"{file} has format {version!r}, this tersor reads {FORMAT_VERSION}: upgrade it")

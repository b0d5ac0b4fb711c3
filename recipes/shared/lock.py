"""A checkpoint's lock file and model card, and the figures and tables in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tersor import _atomic
from tersor.bench.measure import machine, versions, wilson_interval

Lock = dict[str, Any]


def write_lock(folder: Path, facts: Lock, card: Callable[[Lock], str] | None = None) -> Lock:
    """Write ``recipe.lock.json``, and ``CARD.md`` made from it; returns the lock.

    Args:
        folder: Of the checkpoint.
        facts: What the lock says; it gets versions and machine if it does not name those of an earlier start.
        card: Makes the card's Markdown from the lock; None writes no card.
    """
    lock = {
        **facts,
        **{name: get() for name, get in {"versions": versions, "machine": machine}.items() if name not in facts},
    }
    _atomic.write_text(folder / "recipe.lock.json", json.dumps(lock, indent=1) + "\n")
    if card is not None:
        _atomic.write_text(folder / "CARD.md", card(lock))
    return lock


def share_of(hits: int, n: int) -> dict[str, float]:
    """Share of ``hits`` out of ``n`` with its 95 % Wilson interval, as a lock holds it."""
    share = wilson_interval(hits, n)
    return {"share": round(share.value, 4), "low": round(share.low, 4), "high": round(share.high, 4), "n": n}


def percent(share: dict[str, float], *, digits: int = 1, sign: str = "") -> str:
    """What `share_of` gave as percent with its interval; ``sign`` stands behind the number."""
    value, low, high = (f"{100 * share[key]:.{digits}f}" for key in ("share", "low", "high"))
    return f"{value}{sign} [{low}, {high}]"

"""A plot of figures with their intervals, one below the other, as SVG text that needs no library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape, quoteattr

_ROW, _LEFT, _RIGHT, _WIDTH = 26, 190, 60, 720


def forest(rows: Sequence[tuple[str, dict[str, Any]]], description: str, form: str) -> str:
    """The plot; a row without a figure is left out.

    Args:
        rows: Name, and its ``value``, ``low`` and ``high``.
        description: What a screen reader says.
        form: How numbers are written, such as ".0f".
    """
    rows = [(name, found) for name, found in rows if found["value"] is not None]
    ends = [found[key] for _, found in rows for key in ("low", "high")] or [0.0, 1.0]
    least, most = min(ends), max(ends)
    scale = (_WIDTH - _LEFT - _RIGHT) / ((most - least) or 1.0)
    height = _ROW * (len(rows) + 1)
    parts = []
    for place, (name, found) in enumerate(rows):
        y = _ROW * (place + 0.5)
        low, value, high = (_LEFT + (found[key] - least) * scale for key in ("low", "value", "high"))
        short = name if len(name) <= 26 else f"{name[:25]}…"
        parts += [
            f'<text x="{_LEFT - 12}" y="{y + 4:.0f}" text-anchor="end" fill="currentColor">{escape(short)}</text>',
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y:.0f}" y2="{y:.0f}" stroke="#2f80d0" stroke-width="2"/>',
            f'<circle cx="{value:.1f}" cy="{y:.0f}" r="4.5" fill="#2f80d0"/>',
            f'<text x="{high + 8:.1f}" y="{y + 4:.0f}" fill="currentColor">{format(found["value"], form)}</text>',
        ]
    for value in (least, most):
        x = _LEFT + (value - least) * scale
        parts.append(
            f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle" fill="currentColor" opacity="0.7">'
            f"{format(value, form)}</text>"
        )
    return (
        f'<svg role="img" aria-label={quoteattr(description)} viewBox="0 0 {_WIDTH} {height}" '
        f'font-size="13" font-family="system-ui, sans-serif">{"".join(parts)}</svg>'
    )

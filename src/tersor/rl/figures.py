"""What a training changed, as plots: accuracy against tokens, and tokens by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tersor.bench.measure import Estimate
from tersor.bench.plots import Line, plot_lines
from tersor.bench.report import Figure


def draw_frontiers(models: Mapping[str, Sequence[tuple[float, Estimate]]], caption: str) -> Figure:
    """Right answers against tokens in attention.

    Args:
        models: Name -> share of tokens and share of right answers at each threshold.
        caption: Stands below.
    """
    lines = [
        Line(
            name, tuple((100 * ratio, 100 * right.value, 100 * right.low, 100 * right.high) for ratio, right in points)
        )
        for name, points in models.items()
    ]
    svg = plot_lines(
        lines,
        x_label="tokens in attention, %",
        y_label="questions answered right, %",
        description="Accuracy against the share of tokens in attention, before and after the training",
    )
    return Figure(svg, caption)


def draw_layers(models: Mapping[str, Sequence[float]], caption: str) -> Figure:
    """Tokens in attention by layer.

    Args:
        models: Name -> share of tokens in each layer.
        caption: Stands below.
    """
    lines = [
        Line(name, tuple((layer, *(100 * ratio,) * 3) for layer, ratio in enumerate(shares)))
        for name, shares in models.items()
    ]
    svg = plot_lines(
        lines,
        x_label="layer",
        y_label="tokens in attention, %",
        description="Share of tokens in attention by layer, before and after the training",
        whole_x=True,
    )
    return Figure(svg, caption)

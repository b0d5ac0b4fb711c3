"""`tersor images`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tersor.grids.schedule import ZipARSchedule

#: Tokens of a grid; more would be a slip of the keyboard, and a picture of it of no use.
_MOST_CELLS = 1_000_000

images = typer.Typer(help="Autoregressive image models in fewer forward passes.", no_args_is_help=True)


@images.callback()
def _group() -> None:
    """Keep `schedule` a sub-command of its own while it is the only one."""


@images.command()
def schedule(
    grid: Annotated[str, typer.Option(help="Rows x columns in tokens, not in pixels.")] = "90x90",
    window: Annotated[str, typer.Option(help="Cells, or 'quality', 'balanced', 'fast'.")] = "balanced",
    row_start: Annotated[
        str,
        typer.Option(help="'eol' with end-of-row tokens (Emu3, Lumina); without: 'conservative' or 'eager'."),
    ] = "eol",
    out: Annotated[Path | None, typer.Option(help="Draw the decoding order: an animated .svg, or a .gif.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count the forward passes of a ZipAR window against plain decoding, without a model.

    Example: tersor images schedule --grid 90x90 --window 7 --out order.svg
    """
    from tersor.grids.geometry import RasterGrid
    from tersor.grids.schedule import ZipARSchedule, raster_passes, resolve_row_start, resolve_window

    rows, columns = _parse_grid(grid)
    tokens = RasterGrid(rows, columns, end_of_row=row_start == "eol")
    size = resolve_window(int(window) if window.lstrip("-").isdecimal() else window, columns)
    order = ZipARSchedule(tokens, size, resolve_row_start(row_start, tokens))
    if out is not None and out.suffix not in (".svg", ".gif"):
        raise ValueError(f"--out {out} must end in .svg or .gif")
    raster = raster_passes(tokens)
    facts = {
        "grid": [rows, columns],
        "window": size,
        "row_start": order.row_start,
        "passes": order.passes,
        "raster_passes": raster,
        "reduction": 1 - order.passes / raster,
        "tokens_per_pass": rows * columns / order.passes,
        "row_start_pass": [row[0] for row in order.production()],
    }
    if out is not None:
        _draw(order, out)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    typer.echo(
        f"{rows}x{columns} tokens, window {size} of {columns} columns, row start {order.row_start}\n"
        f"{order.passes:,} forward passes instead of {raster:,}: {facts['reduction']:.1%} fewer, "
        f"{facts['tokens_per_pass']:.2f} tokens a pass"
    )
    if out is not None:
        typer.echo(f"order: {out}")


def _draw(order: ZipARSchedule, out: Path) -> None:
    from tersor._atomic import write_text
    from tersor.grids.drawing import as_svg, write_gif

    if out.suffix == ".svg":
        write_text(out, as_svg(order))
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    write_gif(order, out)


def _parse_grid(text: str) -> tuple[int, int]:
    rows, _, columns = text.lower().partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) * int(columns) > 0):
        raise ValueError(f"--grid {text!r} must be rows x columns in tokens, such as 90x90")
    if int(rows) * int(columns) > _MOST_CELLS:
        raise ValueError(f"--grid {text} has {int(rows) * int(columns):,} tokens; at most {_MOST_CELLS:,} are counted")
    return int(rows), int(columns)

"""`tersor images`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor._errors import TersorError

if TYPE_CHECKING:
    from tersor.grids.llamagen import LlamaGenConfig
    from tersor.grids.schedule import ZipARSchedule

#: Images of one run.
_MAX_IMAGES = 10_000
#: Images of one batch.
_BATCH = 100
#: Tokens of a grid; more would be a slip of the keyboard, and a picture of it of no use.
_MAX_CELLS = 1_000_000

images = typer.Typer(help="Autoregressive image models in fewer forward passes.", no_args_is_help=True)


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
    size = resolve_window(_window(window), columns)
    order = ZipARSchedule(tokens, size, resolve_row_start(row_start, tokens))
    if out is not None and out.suffix not in (".svg", ".gif"):
        raise TersorError(f"--out {out} must end in .svg or .gif")
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


@images.command()
def generate(
    model: Annotated[
        str,
        typer.Option(help="Zoo name, or the folder of a LlamaGen or NAR model with its tokenizer in 'tokenizer'."),
    ] = "tiny-raster",
    method: Annotated[
        str | None,
        typer.Option(
            help="Raster models: 'zipar', 'speculative' for the images of 'raster' in fewer passes, or 'raster', one "
            "token a pass. NAR models: 'nar'."
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            help="zipar: cells, or 'quality', 'balanced' (if left out), 'fast'; speculative: cells that a pass tests."
        ),
    ] = None,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="zipar: verify each row's first token.")] = False,
    row_start: Annotated[str, typer.Option(help="zipar: 'conservative' or 'eager'.")] = "conservative",
    mode: Annotated[
        str,
        typer.Option(
            help="speculative: 'seed' makes the images of one token a pass, 'law' others of the same probabilities, "
            "'grouped' others of other probabilities."
        ),
    ] = "seed",
    first_drafts: Annotated[
        str, typer.Option(help="speculative: 'above', 'left', 'random', 'law above' or 'law left'.")
    ] = "above",
    count: Annotated[
        int | None, typer.Option("-n", "--count", help="Images to make; as many as --seeds, or 16.", show_default=False)
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Classes by number or name, such as 0,1 or cat,dog, in turns; all if left out.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="tiny-nar-text: such as 'a thick seven slanted left'.")] = None,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many tokens; 0 is all.")] = 0,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is none; the model's own if left out.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling, of all images.")] = 0,
    seeds: Annotated[
        str | None,
        typer.Option(help="A seed for each image, such as 1,2,3: an image is the same whatever is made beside it."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The sheet of images, a .png; of clips a .gif.")] = Path("grid.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make images: several rows a pass, several tested drafts a pass, or token by token; clips with a NAR model.

    Example: tersor images generate --window 7 -n 16 --labels 3,8 --out grid.png

    Example: tersor images generate --method speculative -n 16 --out grid.png

    Example: tersor images generate --model tiny-nar-video -n 9 --out clip.gif
    """
    if method not in (None, "zipar", "speculative", "raster", "nar"):
        raise TersorError(f"--method {method!r} must be 'zipar' or 'raster' or 'speculative', or of a NAR model 'nar'")
    drawn = _seeds(seeds, seed)
    if drawn is not None and count not in (None, len(drawn)):
        raise TersorError(f"-n {count} and {len(drawn)} --seeds: give a seed for each image, or leave -n out")
    if drawn is not None and (adaptive or mode in ("law", "grouped")):
        raise TersorError("--seeds does not go with --adaptive and with --mode law or grouped: they test all together")
    if count is None:
        count = 16 if drawn is None else len(drawn)
    if not 1 <= count <= _MAX_IMAGES:
        raise TersorError(f"-n {count} must be from 1 to {_MAX_IMAGES:,}")
    of_zipar = adaptive or row_start != "conservative"
    if (window is not None and method in ("raster", "nar")) or (of_zipar and method not in (None, "zipar")):
        raise TersorError(
            "--window, --adaptive and --row-start are settings of --method zipar; speculative has --window"
        )
    if method != "speculative" and (mode != "seed" or first_drafts != "above"):
        raise TersorError("--mode and --first-drafts are settings of --method speculative")
    if temperature < 0 or top_k < 0:
        raise TersorError(f"--temperature {temperature} and --top-k {top_k} must not be negative")
    if guidance_scale is not None and guidance_scale < 0:
        raise TersorError(f"--guidance-scale {guidance_scale} must not be negative; 1 is no guidance")
    if (nar := _nar_folder(model, method)) is not None:
        if window is not None or of_zipar:
            raise TersorError("--window, --adaptive and --row-start are settings of --method zipar")
        from tersor.grids.nar.cli import check_nar, generate_nar, summary_line

        drawing: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "guidance_scale": guidance_scale}
        shape = check_nar(nar, prompt, labels, drawing, out)
        conditions = [prompt] * count if prompt is not None else _classes(labels, count, shape)
        typer.echo(summary_line(generate_nar(nar, shape, conditions, drawing, drawn or seed, out), as_json))
        return
    if prompt is not None:
        raise TersorError("--prompt is for models that read text, such as tiny-nar-text")
    if out.suffix != ".png":
        raise TersorError(f"--out {out} must end in .png")
    method = method or "zipar"
    folder, config = _raster_model(model)
    settings: dict[str, Any] = {}
    if method == "zipar":
        settings = _zipar_settings(window or "balanced", adaptive, row_start, config.grid_size)
    elif method == "speculative":
        settings = _speculative_settings(window or "auto", mode, first_drafts)
    classes = _classes(labels, count, config)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    if guidance_scale is not None:
        sampling["guidance_scale"] = guidance_scale
    _generate(folder, method, classes, settings, sampling, drawn or seed, out, as_json)


def _nar_folder(name: str, method: str | None) -> Path | None:
    """Folder of a NAR model; None for another one. Raises `ValueError` for a method that the model does not have."""
    from tersor import zoo
    from tersor.zoo.inspection import read_config

    folder = zoo.path(name) if name in zoo.names() else Path(name).expanduser()
    if not folder.is_dir():
        raise TersorError(f"--model {name}: no such folder, and not in the zoo; give one that save_pretrained wrote")
    architectures = read_config(folder).get("architectures")
    is_nar = architectures == ["NARForImageGeneration"]
    if method is not None and (method == "nar") != is_nar:
        raise TersorError(f"--method {method} does not go with --model {name}, which is of {architectures}")
    return folder if is_nar else None


def _raster_model(name: str) -> tuple[Path, LlamaGenConfig]:
    """Folder and configuration of a zoo model or of a folder; raises `ValueError` for what makes no images by class."""
    from tersor import zoo
    from tersor.zoo.inspection import check_config, read_config, refused

    folder = zoo.path(name) if name in zoo.names() else Path(name).expanduser()
    described = read_config(folder)
    architectures = described.get("architectures")
    if architectures != ["LlamaGen"]:
        raise TersorError(
            f"--model {name} is of {architectures}; this command takes a LlamaGen, such as tiny-raster. "
            "Other models: tersor.speculative_generate and tersor.zipar_generate in Python"
        )
    if not (folder / "tokenizer" / "config.json").is_file():
        raise TersorError(
            f"--model {name}: {folder} has no image tokenizer; save one to {folder / 'tokenizer'} with save_pretrained"
        )
    if described.get("condition", "class") != "class":
        raise TersorError(
            f"--model {name} is conditioned on text features; tersor.speculative_generate makes its images in Python"
        )
    check_config(folder)
    check_config(folder / "tokenizer")
    from tersor.grids.llamagen import LlamaGenConfig

    with refused(f"--model {name}"):
        config = LlamaGenConfig.from_pretrained(folder, local_files_only=True)
    return folder, config


def _speculative_settings(window: str, mode: str, first_drafts: str) -> dict[str, Any]:
    """Arguments of `speculative_generate`; raises `ValueError` for those that it does not take."""
    from tersor.grids.speculative.config import SpeculativeConfig

    settings: dict[str, Any] = {"window_size": _window(window), "mode": mode, "first_drafts": first_drafts}
    SpeculativeConfig(**settings)
    return settings


def _zipar_settings(window: str, adaptive: bool, row_start: str, grid: Sequence[int]) -> dict[str, Any]:
    """Arguments of `zipar_generate`; raises `ValueError` for a window or a row start that the grid does not have."""
    from tersor.grids.geometry import RasterGrid
    from tersor.grids.schedule import check_row_start, resolve_window

    check_row_start(row_start, RasterGrid(grid[0], grid[1]))
    return {"window_size": resolve_window(_window(window), grid[1]), "adaptive": adaptive, "row_start": row_start}


def _window(text: str) -> int | str:
    """A number of cells, or the name of a preset."""
    return int(text) if text.lstrip("-").isdecimal() else text


def _seeds(text: str | None, seed: int) -> list[int] | None:
    """A seed for each image, None for one of them all."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if seed or not all(part.isdecimal() and int(part) < 2**63 for part in parts):
        raise TersorError(f"--seeds {text!r} must be whole numbers with commas between them, and goes without --seed")
    return [int(part) for part in parts]


def _classes(labels: str | None, count: int, config: Any) -> list[int]:
    """One class an image."""
    from tersor.grids.conditions import class_numbers

    found = [*range(max(1, config.num_classes))]
    if labels is not None:
        try:
            found = class_numbers([part.strip() for part in labels.split(",")], config)
        except TersorError as error:
            raise TersorError(f"--labels {labels}: {error}") from None
    return [found[index % len(found)] for index in range(count)]


def _generate(
    folder: Path,
    method: str,
    classes: list[int],
    settings: dict[str, Any],
    sampling: dict[str, Any],
    seed: int | list[int],
    out: Path,
    as_json: bool,
) -> None:
    """Decode, write the sheet, and say what it took; ``settings`` are the method's, none for raster."""
    import torch

    from tersor._atomic import write_bytes
    from tersor.grids.drawing import as_png
    from tersor.grids.llamagen import LlamaGen
    from tersor.grids.sampling import part_of, seeded
    from tersor.grids.speculative.generation import speculative_generate
    from tersor.grids.tokenizer import load_tokenizer
    from tersor.grids.zipar.generation import zipar_generate
    from tersor.zoo.inspection import load_checked

    model = load_checked(LlamaGen, folder, dtype=torch.float32, local_files_only=True)
    tokenizer = load_tokenizer(folder / "tokenizer")
    rows, columns = model.config.grid_size
    generator = seeded(seed)
    ids, passes, fed, acceptance = [], [], [], []
    started = time.perf_counter()
    for first in range(0, len(classes), _BATCH):
        part = torch.tensor(classes[first : first + _BATCH])
        own = part_of(generator, first, first + _BATCH)
        if method == "raster":
            ids.append(model.generate(part, generator=own, **sampling))
            passes.append(rows * columns)
            continue
        decode: Any = zipar_generate if method == "zipar" else speculative_generate
        output = decode(model, part, generator=own, return_dict_in_generate=True, **settings, **sampling)
        ids.append(output.sequences)
        passes.append(output.forward_passes)
        if method == "speculative":
            fed.append(output.fed_tokens)
            acceptance.append(torch.tensor(output.acceptance) * len(part) / len(classes))
    seconds = time.perf_counter() - started
    pictures = tokenizer.decode(torch.cat(ids).view(-1, rows, columns))
    write_bytes(out, as_png(pictures, scale=max(1, 112 // pictures.shape[-1])))
    facts = {
        "model": folder.name, "method": method, **settings, "images": len(classes),
        "labels": classes, "passes": passes, "raster_passes": rows * columns, "seconds": seconds, "seed": seed,
        "out": str(out),
    }  # fmt: skip
    if method == "speculative":
        facts |= {"fed_tokens": fed, "acceptance": torch.stack(acceptance).sum(0).tolist()}
    if as_json:
        typer.echo(json.dumps(facts))
        return
    typer.echo(
        f"{len(classes)} images in {seconds:.1f} s, {sum(passes) / len(passes):.0f} forward passes each instead of "
        f"{rows * columns}: {out}"
    )


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
        raise TersorError(f"--grid {text!r} must be rows x columns in tokens, such as 90x90")
    if int(rows) * int(columns) > _MAX_CELLS:
        raise TersorError(f"--grid {text} has {int(rows) * int(columns):,} tokens; at most {_MAX_CELLS:,} are counted")
    return int(rows), int(columns)

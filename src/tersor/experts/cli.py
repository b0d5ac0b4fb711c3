"""`tersor experts`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor._console import prefixed, spinner
from tersor._errors import TersorError
from tersor._options import FOLDER
from tersor.experts.router.cli import router
from tersor.experts.server.cli import serve

if TYPE_CHECKING:
    from tersor.experts.delta import ExpertDelta

experts = typer.Typer(help="Fine-tuned experts as packed deltas of one base.", no_args_is_help=True)
experts.add_typer(router, name="router")
experts.command()(serve)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Base = Annotated[str, typer.Option(help="Folder or hub name of the base.")]
Delta = Annotated[str, typer.Argument(help="Folder or hub name of a delta.")]


@experts.command()
def pack(
    base: Base,
    expert: Annotated[
        list[str],
        typer.Option(help="NAME=FOLDER or hub name of an expert or a PEFT adapter; several times."),
    ],
    out: Annotated[
        Path, typer.Option(metavar=FOLDER, help="Gets one folder a name; finished ones are not made again.")
    ],
    bits: Annotated[int, typer.Option(help="Bits of a code: 1, 2, 3, 4 or 8.")] = 2,
    grid: Annotated[str, typer.Option(help="'signed' or 'midrise'.")] = "signed",
    num_salient: Annotated[
        int, typer.Option("--salient", help="Input channels of each linear that stay in 16 bits.")
    ] = 8,
    step_init: Annotated[str, typer.Option(help="'mse', 'lsq' or 'minmax'.")] = "mse",
    distill: Annotated[str, typer.Option(help="'none', 'codes' or 'closed_form'.")] = "none",
    calibration: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE with a text a line, of the expert's own domain.")
    ] = None,
    full_modules: Annotated[
        list[str] | None,
        typer.Option("--full-modules", help="Name of modules to store complete, as 'experts'; several times."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack experts; an interrupted run goes on where it stopped.

    Example: tersor experts pack --base B --expert math=M --expert code=C --calibration math=math.txt --out bank/
    """
    from tersor.experts.config import DeltaConfig

    config = DeltaConfig(
        bits=bits,
        grid=grid,
        num_salient=num_salient,
        step_init=step_init,
        distill=None if distill == "none" else distill,
        full_modules=tuple(full_modules or ()),
    )
    folders, texts = _pairs("--expert", expert), _pairs("--calibration", calibration or [])
    if unknown := sorted(set(texts) - set(folders)):
        raise TersorError(f"--calibration names {unknown[0]!r}, which no --expert does")
    rows = {name: _lines(Path(file)) for name, file in texts.items()}
    from tersor.experts.adapters import ADAPTER
    from tersor.experts.packing import pack_expert
    from tersor.experts.sources import check_folder, local_folder

    for folder in (base, *folders.values()):
        if folder == base or not (local_folder(folder) / ADAPTER).is_file():
            check_folder(local_folder(folder))
    facts: dict[str, Any] = {}
    with spinner() as status:
        for name, folder in folders.items():
            target = out / name
            delta = pack_expert(
                base, folder, target, config, calibration=rows.get(name), on_progress=prefixed(status.update, name)
            )
            facts[name] = {"folder": str(target), **_sizes(delta)}
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, fact in facts.items():
        typer.echo(f"{name}: {fact['bytes']:,} bytes, {fact['share']:.1%} of the expert in 16 bits: {fact['folder']}")


@experts.command()
def inspect(delta: Delta, as_json: Json = False) -> None:
    """Show what a delta holds: bytes by part, and bits, channels and error of each linear."""
    from tersor.experts.delta import ExpertDelta

    read = ExpertDelta.from_pretrained(delta)
    manifest = read.manifest
    facts = {
        "base": manifest.base_model_name_or_path, "expert": manifest.expert_model_name_or_path,
        "base_fingerprint": manifest.base_fingerprint, "config": manifest.config.to_dict(),
        **_sizes(read), "parts": read.bytes_by_part(), "complete": manifest.full, "same": len(manifest.same),
        "notes": manifest.notes,
        "linears": {
            name: {
                "shape": list(linear.shape), "bits": linear.bits, "salient": read.packed(name).salient_index.tolist(),
                "bits_per_weight": 8 * sum(part.nbytes for part in read.packed(name).tensors) / _numbers(linear.shape),
                "error": linear.error,
            }
            for name, linear in manifest.modules.items()
        },
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts))
        return
    typer.echo(f"{facts['expert']} on {facts['base']}: {read.nbytes:,} bytes, {facts['share']:.1%} of 16 bits")
    for part, size in read.bytes_by_part().items():
        typer.echo(f"  {part}: {size:,}")
    for name, linear in facts["linears"].items():
        shape = " x ".join(map(str, linear["shape"]))
        typer.echo(
            f"{name}: {shape}, {linear['bits_per_weight']:.2f} bits a weight, {len(linear['salient'])} salient, "
            f"error {linear['error']:.3f}"
        )


@experts.command()
def verify(
    delta: Delta,
    base: Base,
    expert: Annotated[str, typer.Option(help="Folder or hub name of the uncompressed expert.")],
    texts: Annotated[
        Path | None, typer.Option(help="A text a line, to compare answers on; held out, if you can.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Compare every number of base and expert, not a sample of each tensor.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare a delta with the expert that it stands for: weights, and on texts the answers."""
    from tersor.experts.delta import ExpertDelta
    from tersor.experts.verify import compare_answers, compare_weights

    read = ExpertDelta.from_pretrained(delta)
    rows = None if texts is None else _lines(texts)
    facts: dict[str, Any] = {"errors": compare_weights(read, base, expert, full=full)}
    if rows is not None:
        with spinner() as status:
            status.update("answers")
            facts |= compare_answers(read, base, expert, rows)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, error in facts["errors"].items():
        typer.echo(f"{name}: error {error:.3f} of the delta")
    for name, value in facts.items():
        if name != "errors":
            typer.echo(f"{name}: {value:.4g}")


@experts.command()
def merge(
    delta: Delta,
    base: Base,
    out: Annotated[Path, typer.Option(metavar=FOLDER, help="Folder of the new checkpoint.")],
    as_json: Json = False,
) -> None:
    """Write an expert as a plain checkpoint, for any other engine."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TersorError(f"--out {out} is not empty; give a new folder")
    from tersor.experts.delta import ExpertDelta
    from tersor.experts.verify import merge_folder

    merge_folder(ExpertDelta.from_pretrained(delta), base, out)
    typer.echo(json.dumps({"out": str(out)}) if as_json else f"{out}")


def _pairs(option: str, values: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        plain = name.replace("-", "").replace("_", "").isalnum()
        if not equals or not path or not plain or name in found:
            raise TersorError(f"{option} {value!r} must be NAME=PATH, each name once, of letters, digits, '-' and '_'")
        found[name] = path
    return found


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise TersorError(f"{file}: no such file")
    try:
        rows = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise TersorError(f"{file} is not UTF-8 text") from None
    if not rows:
        raise TersorError(f"{file} holds no text")
    return rows


def _sizes(delta: ExpertDelta) -> dict[str, Any]:
    """Bytes, and their share of the expert in 16 bits."""
    complete = sum(delta.tensors[name].numel() for name in delta.manifest.full)
    packed = sum(_numbers(linear.shape) for linear in delta.manifest.modules.values())
    whole = 2 * (complete + packed)
    return {"bytes": delta.nbytes, "share": delta.nbytes / whole if whole else 0.0}


def _numbers(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]

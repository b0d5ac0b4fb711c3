"""`tersor train`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor._errors import TersorError
from tersor._options import FOLDER
from tersor._weights import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tersor.grids.nar.tokens import Tokens

train = typer.Typer(help="Train models of tersor.", no_args_is_help=True)

_SIZES = "hidden_size, num_hidden_layers and num_attention_heads"


@train.command()
def tokens(
    images: Annotated[
        Path,
        typer.Option(help="Folder of pictures, a sub-folder a class; or an .npz with 'images' and 'class_labels'."),
    ],
    tokenizer: Annotated[str, typer.Option(help="Zoo name, or the folder of an image tokenizer.")] = "tiny-raster",
    depth: Annotated[int, typer.Option(help="Frames of a token, for clips in an .npz; 0 is for images.")] = 0,
    out: Annotated[Path, typer.Option(help="The token file, a .safetensors.")] = Path("tokens.safetensors"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Encode pictures or clips once, so that training reads ids.

    Example: tersor train tokens --images photos/ --tokenizer vq16/ --out tokens.safetensors
    """
    if out.suffix != ".safetensors":
        raise TersorError(f"--out {out} must end in .safetensors")
    if depth < 0:
        raise TersorError(f"--depth {depth} must be a number of frames, or 0 for images")
    from tersor import zoo
    from tersor.grids.nar.tokens import extract, read_source
    from tersor.grids.tokenizer import load_tokenizer

    source, folder = read_source(images), tokenizer_folder(tokenizer)
    if bool(depth) != bool(source.frames) or (depth and source.frames % depth):
        what = f"clips of {source.frames} frames; give a --depth that divides it" if source.frames else "no clips"
        raise TersorError(f"--depth {depth}: {images} holds {what}")
    encoder: Any = load_tokenizer(folder)
    if depth:
        from tersor.grids.nar.pipeline import TubeletTokenizer

        encoder = TubeletTokenizer(encoder, depth)
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("encoding", total=source.count)
        found = extract(source, encoder, lambda done, count: progress.update(task, completed=done))
    name = tokenizer if tokenizer in zoo.names() else str(folder.resolve())
    replace(found, tokenizer=(name, fingerprint(folder))).save(out)
    facts = {
        "samples": len(found), "grid": list(found.grid_size), "vocab_size": found.vocab_size,
        "conditions": sorted(found.conditions), "class_names": list(found.class_names), "out": str(out),
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts))
        return
    typer.echo(f"{len(found):,} samples of {' x '.join(map(str, found.grid_size))} tokens: {out}")


@train.command()
def nar(
    tokens: Annotated[Path, typer.Option(help="Token file of `tersor train tokens`.")],
    out: Annotated[
        Path, typer.Option(metavar=FOLDER, help="Folder of checkpoints and of the model; an interrupted run resumes.")
    ],
    steps: Annotated[int, typer.Option(help="Updates of the weights.")],
    size: Annotated[
        str, typer.Option(help=f"A published size such as 'B' or 'video-L', or {_SIZES} as WIDTHxLAYERSxHEADS.")
    ] = "B",
    start_from: Annotated[
        Path | None,
        typer.Option(help="Folder of a NAR model to go on from, or of a LlamaGen, token by token, to start from."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples of a process and update.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="The highest one.")] = 1e-4,
    schedule: Annotated[str, typer.Option(help="'step' (the paper's images), 'cosine' or 'constant'.")] = "step",
    warmup_steps: Annotated[int, typer.Option("--warmup", help="Updates in which the rate rises.")] = 0,
    dropout: Annotated[float, typer.Option(help="Of tokens and within blocks.")] = 0.1,
    condition_dropout: Annotated[
        float, typer.Option(help="Part of the samples, from 0 to 1, without their class or text.")
    ] = 0.1,
    held_out: Annotated[int, typer.Option(help="Samples to keep for the held-out loss; 0 is none.")] = 0,
    evaluate_every: Annotated[int, typer.Option(help="Updates between held-out losses; 0 is at the end only.")] = 0,
    save_every: Annotated[int, typer.Option(help="Updates between checkpoints; 0 keeps none.")] = 500,
    sample_every: Annotated[int, typer.Option(help="Updates between pictures of samples; 0 makes none.")] = 0,
    tokenizer: Annotated[
        str | None, typer.Option(help="Zoo name or folder of the image tokenizer; left out, what made the tokens.")
    ] = None,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Autocast to bfloat16.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of initialization, order and dropout.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the curve as one JSON object.")] = False,
) -> None:
    """Train a NAR model on a token file; on many GPUs by `accelerate launch -m tersor train nar ...`.

    Example: tersor train nar --tokens tokens.safetensors --out run/ --steps 300000 --batch-size 64 --bfloat16
    """
    from tersor._lazy import require

    require("accelerate", "train")
    from tersor.grids.nar.tokens import Tokens
    from tersor.grids.nar.training import NARTraining, sample_sheet
    from tersor.grids.nar.training import train as run
    from tersor.grids.tokenizer import load_tokenizer

    plan = NARTraining(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate, schedule=schedule, warmup_steps=warmup_steps,
        bfloat16=bfloat16, gradient_checkpointing=gradient_checkpointing, save_every=save_every,
        sample_every=sample_every, evaluate_every=evaluate_every, seed=seed,
    )  # fmt: skip
    if held_out < 0:
        raise TersorError(f"--held-out {held_out} must not be negative")
    data = Tokens.load(tokens)
    training, other = data.split(held_out, seed=seed) if held_out else (data, None)
    model = _model(size, start_from, data, dropout, condition_dropout, seed)
    folder, draw = _tokenizer_of(data, tokenizer), None
    if sample_every and folder is None:
        raise TersorError("--sample-every draws pictures: give the --tokenizer that made the tokens")
    if folder is not None:
        decoder: Any = load_tokenizer(folder)
        if len(data.grid_size) == 3:
            from tersor.grids.nar.pipeline import TubeletTokenizer

            # Grey clips: the frames of a token are the channels of its tokenizer.
            decoder = TubeletTokenizer(decoder, decoder.config.channels)
        if decoder.codebook_size != data.vocab_size:
            raise TersorError(f"--tokenizer {folder} has {decoder.codebook_size} ids, the tokens {data.vocab_size}")
        draw = sample_sheet(decoder.decode, **_shown(data), seed=seed)
    curve = run(
        model, training, plan, out, held_out=other, draw=draw, tokenizer=folder,
        quiet=as_json or not sys.stderr.isatty(),
    )  # fmt: skip
    last = {name: row[name] for row in curve for name in ("loss", "eval_loss") if name in row}
    if as_json:
        typer.echo(json.dumps({"out": str(out / "model"), **last, "curve": curve}))
        return
    typer.echo(f"{', '.join(f'{name} {value:.4f}' for name, value in last.items())}: {out / 'model'}")
    if folder is None:
        typer.echo(f"It has no image tokenizer; `tersor images generate` wants one in {out / 'model' / 'tokenizer'}")


def _model(
    size: str, start_from: Path | None, data: Tokens, dropout: float, condition_dropout: float, seed: int
) -> PreTrainedModel:
    """A model for ``data``; raises `ValueError` for an unknown size, or a start with other tokens."""
    import torch

    from tersor.grids.nar.heads import NARConfig, NARForImageGeneration
    from tersor.grids.nar.model import PRESETS

    rates = {
        "token_dropout": dropout, "residual_dropout": dropout, "ffn_dropout": dropout,
        "condition_dropout": condition_dropout,
    }  # fmt: skip
    if start_from is not None:
        return _start(start_from, rates)
    labels, features = data.conditions.get("class_labels"), data.conditions.get("text_features")
    settings: dict[str, Any] = {"vocab_size": data.vocab_size, "grid_size": data.grid_size, **rates}
    if features is not None:
        settings |= {"condition": "text", "condition_tokens": features.shape[1], "caption_size": features.shape[2]}
    elif labels is not None:
        settings |= {"num_classes": len(data.class_names) or int(labels.max()) + 1}
        if data.class_names:
            settings |= {"id2label": dict(enumerate(data.class_names))}
    else:
        settings |= {"condition": "none"}
    torch.manual_seed(seed)
    if size in PRESETS:
        return NARForImageGeneration(NARConfig.preset(size, **settings))
    numbers = size.split("x")
    if len(numbers) != 3 or not all(each.isdecimal() and int(each) for each in numbers):
        raise TersorError(f"--size {size!r} must be one of {[*PRESETS]}, or {_SIZES} such as 256x6x8")
    width, layers, heads = map(int, numbers)
    return NARForImageGeneration(
        NARConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, **settings)
    )


def _start(folder: Path, rates: dict[str, float]) -> PreTrainedModel:
    """What is in ``folder``; of a raster model `NARForImageGeneration.from_raster`."""
    from tersor.grids.llamagen import LlamaGen
    from tersor.grids.nar.heads import NARForImageGeneration
    from tersor.zoo.inspection import check_config, load_checked, read_config

    kind = read_config(folder).get("architectures")
    homes: dict[str, Any] = {"NARForImageGeneration": NARForImageGeneration, "LlamaGen": LlamaGen}
    own = homes.get(" ".join(kind or ()))
    if own is None:
        raise TersorError(
            f"--start-from {folder} must hold a NAR model or a LlamaGen that save_pretrained wrote; has {kind}"
        )
    check_config(folder)
    if own is LlamaGen:
        return NARForImageGeneration.from_raster(load_checked(LlamaGen, folder, local_files_only=True), **rates)
    model: PreTrainedModel = load_checked(NARForImageGeneration, folder, local_files_only=True, **rates)
    return model


def tokenizer_folder(name: str) -> Path:
    """Where an image tokenizer is, of the zoo or in a folder."""
    from tersor import zoo

    return zoo.path(name) / "tokenizer" if name in zoo.names() else Path(name).expanduser()


def _tokenizer_of(data: Tokens, given: str | None) -> Path | None:
    """The tokenizer of a token file: the given one, or the one that made the tokens, if it is still there.

    Raises:
        TersorError: If the given one has other weights than the one that made the tokens.
    """
    name, weights = data.tokenizer
    folder = tokenizer_folder(given or name) if given or name else None
    same = folder is not None and fingerprint(folder) == weights
    if given and weights and not same:
        raise TersorError(f"--tokenizer {given} has other weights than {name}, which made the tokens; give that one")
    return folder if given or same else None


def _shown(data: Tokens, most: int = 16) -> dict[str, Any]:
    """Conditions of a few samples, evenly over the file."""
    step = max(1, len(data) // most)
    found = data.__getitems__(range(0, len(data), step)[:most])
    if not data.conditions:
        return {"num_return_sequences": most}
    return {name: found[name] for name in data.conditions}

"""`tersor tune`: a cache plan for one model, from a few of the user's own texts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor import _atomic
from tersor._console import spinner
from tersor._errors import TersorError
from tersor.zoo import loading

if TYPE_CHECKING:
    from tersor.kv.tune.run import Setting, Tuning

#: Tokens of the shortest pieces: their prompts must be longer than what waits to be compressed.
SHORTEST = 256


def tune(
    texts: Annotated[
        Path, typer.Option(help='Texts of your own: a .jsonl with a "text" in each row, or one text in any other file.')
    ],
    budget: Annotated[str, typer.Option(help="How many times smaller than 16 bits the cache must be, such as 4.5x.")],
    out: Annotated[Path, typer.Option(help="Write the plan here; its name ends in .json.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub name or zoo name.")] = "tiny-lm",
    tokens: Annotated[int, typer.Option(help="Tokens of a piece of text; the last eighth is what is foretold.")] = 1024,
    pieces: Annotated[int, typer.Option(help="Pieces to read at most; half of them choose, half are held out.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of which pieces are read.")] = 0,
    device: Annotated[str, typer.Option(help="Torch device; 'auto' takes a GPU when there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Find the cache settings that lose least on your texts at a budget: widths by layer, or one setting for all.

    Every command with --cache takes the plan that is written. The figures are of pieces that nothing was chosen by.

    Example: tersor tune --model tiny-lm --texts texts.jsonl --budget 4.5x --out plan.json
    """
    times = _times(budget)
    if out.suffix != ".json":
        raise TersorError(f"--out {out} must end in .json, by which --cache knows a plan")
    if seed < 0:
        raise TersorError(f"--seed {seed} must not be negative")
    if tokens < SHORTEST:
        raise TersorError(f"--tokens {tokens} must be at least {SHORTEST}; shorter prompts wait uncompressed")
    from tersor.kv.tune.pieces import LEAST, cut, halves, read_texts

    if pieces < LEAST:
        raise TersorError(f"--pieces {pieces} must be at least {LEAST}")
    read = read_texts(texts)
    location = loading.resolve(model)
    network, tokenizer = loading.load(location, device)
    limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise TersorError(f"--tokens {tokens} exceed the model's {limit} positions")
    parts = halves(cut(read, tokenizer, tokens), pieces, seed)
    from tersor.kv.tune.run import tune as search

    with spinner() as status:
        found = search(network, parts, times, status.update)
    _atomic.write_text(out, found.plan.to_json())
    if as_json:
        typer.echo(json.dumps({"plan": str(out), "model": model, "budget": times, "seed": seed, **facts(found)}))
    else:
        _print(found, out)


def _times(budget: str) -> float:
    """The number in "4.5x" or "4.5"."""
    if not re.fullmatch(r"\d+(\.\d+)?x?", budget) or float(budget.rstrip("x")) <= 1:
        raise TersorError(f"--budget {budget!r} must be a number above 1 and an x, such as 4.5x")
    return float(budget.rstrip("x"))


def facts(found: Tuning) -> dict[str, Any]:
    """What a search found, for JSON: the chosen setting, all of them on the pieces held out, and each layer alone."""
    widths = found.widths()
    return {
        "chosen": found.settings[0].name,
        "pieces": len(found.settings[0].held_out.added),
        "key_bits": None if widths is None else [keys for keys, _ in widths],
        "value_bits": None if widths is None else [values for _, values in widths],
        "settings": [_row(each, found.settings[0]) for each in found.settings],
        "left_out": found.left_out,
        "layers_alone": [
            {
                part: {width: cost.loss for width, cost in getattr(layer, part).items()}
                for part in ("keys", "values")
            }
            for layer in found.layers
        ],
    }  # fmt: skip


def _row(setting: Setting, chosen: Setting) -> dict[str, Any]:
    added, less = setting.held_out.added_loss(), setting.held_out.against(chosen.held_out)
    return {
        "name": setting.name,
        "times_smaller": setting.held_out.ratio,
        "divergence": setting.held_out.mean,
        "added_loss": [added.value, added.low, added.high],
        "more_than_chosen": [less.value, less.low, less.high],
    }


def _print(found: Tuning, out: Path) -> None:
    from tersor.bench.runs import cell, show

    chosen = found.settings[0]
    rows = []
    for each in found.settings:
        own = each.held_out
        against = "chosen" if each is chosen else cell(own.against(chosen.held_out), "+.4f")
        rows.append([each.name, f"{own.ratio:.2f}", f"{own.mean:.5f}", cell(own.added_loss(), "+.4f"), against])
    columns = ["setting", "x smaller", "divergence", "added loss, nats a token", "more than the chosen one"]
    show(columns, rows, title=f"{len(chosen.held_out.added)} pieces held out")
    if (widths := found.widths()) is not None:
        for name, bits in zip(("keys", "values"), zip(*widths, strict=True), strict=True):
            typer.echo(f"bits of {name} by layer: {' '.join(map(str, bits))}")
    for name, ratio in found.left_out.items():
        typer.echo(f"left out: {name}, {ratio:.2f} times smaller on all pieces")
    typer.echo(f"{out}: use it with --cache {out}")

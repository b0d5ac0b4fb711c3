"""Checkpoint folders, lock files and model cards of the NAR models, and of what they are compared with."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from raster.export import floors, spread
from shared.lock import Lock, percent, write_lock
from torch import Tensor
from transformers import PreTrainedModel

from tersor import _atomic, zoo
from tersor.bench.measure import machine, versions
from tersor.bench.runs import markdown
from tersor.grids.judge import DigitClassifier, Reference
from tersor.grids.nar.bench.quality import MIXINGS, one_sided
from tersor.grids.nar.heads import NARForImageGeneration
from tersor.grids.nar.tokens import Tokens

#: In a checkpoint's folder: what it is compared with.
COMPARED = "compared"
#: Samples of a seed in `tersor bench nar`: of fewer, a Fréchet distance is larger, and so is the floor.
SEED_SAMPLES = 3000
#: Sets of so many real samples: the distance of a single one may be half of the mean or twice as much.
FLOOR_SETS = 10


def begun_on(folder: Path) -> dict[str, Any]:
    """The machine, and the versions there, on which the training in ``folder`` was first started."""
    file = folder.with_name(f"{folder.name}.begun.json")
    if not file.is_file():
        _atomic.write_text(file, json.dumps({"versions": versions(), "machine": machine()}, indent=1) + "\n")
    begun: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return begun


def export(
    model: PreTrainedModel, facts: Lock, curve: list[dict[str, Any]], *, out: Path, scores: dict[str, Any] | None = None
) -> Lock:
    """Write bfloat16 weights and the lock, and of NAR itself the card; returns the lock.

    Args:
        model: A trained one.
        facts: Recipe, kind, data, plan, and what `begun_on` says.
        curve: Of the training.
        out: Folder of the NAR model; other kinds go into one of their name below it.
        scores: Further ones than the held-out loss.
    """
    kind = facts["kind"]
    folder = out if kind == "nar" else out / COMPARED / kind
    model.to(torch.bfloat16).save_pretrained(folder)
    lock = {
        **facts,
        "parameters": sum(p.numel() for p in model.parameters()),
        "scores": {"held_out_nats_per_token": round(curve[-1]["eval_loss"], 4), **(scores or {})},
        "curve": [row for row in curve if "eval_loss" in row],
    }
    if kind != "nar":
        return write_lock(folder, lock)
    further = model.config.exits[-1] - model.config.num_hidden_layers
    return write_lock(folder, lock, partial(card, out.name, further))


def with_tokenizer(folder: Path, judge: str) -> None:
    """Put the tokenizer of another zoo model into ``folder``."""
    shutil.copytree(zoo.path(judge) / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)


def floors_of(judge: tuple[DigitClassifier, Reference], tokenizer: Any, pixels: Tensor) -> dict[str, Any]:
    """The Fréchet distances of real samples, as a part of a lock's scores."""
    size = min(SEED_SAMPLES, len(pixels) // 2)
    sets = min(FLOOR_SETS, len(pixels) // size)
    return {"frechet_floors": {"images": size, **floors(*judge, tokenizer, pixels, images=size, sets=sets)}}


def heads_alone(model: NARForImageGeneration, held_out: Tokens) -> dict[str, Any]:
    """The held-out losses with each head alone wherever it sees the cell, as a part of a lock's scores."""
    model.eval()
    found = {}
    for head in tuple(MIXINGS)[: len(model.config.grid_size)]:
        alone, losses = one_sided(model, head), []
        for rows in torch.arange(len(held_out)).split(50):
            batch = {name: each.to(model.device) for name, each in held_out.__getitems__(rows.tolist()).items()}
            with torch.no_grad():
                losses.append(len(rows) * alone(**batch).loss.item())
        found[head] = round(sum(losses) / len(held_out), 4)
    return {"held_out_nats_per_token_of_heads_alone": found}


_ABOUT = {
    "tiny-nar": (
        "decodes grey images of 28 x 28 pixels by class, on a grid of 14 x 14 tokens from its top right corner, in "
        "27 forward passes",
        "`tokenizer/` is tiny-raster's, whose classifier also judges the samples. `compared/` holds a raster model, "
        "PAR with 4 and with 14 parts, and a single-head NAR of the same backbone, trained by the same recipe for as "
        "many steps.",
    ),
    "tiny-nar-text": (
        'decodes grey images of 28 x 28 pixels from captions such as "a thick seven slanted left", on a grid of '
        "14 x 14 tokens, in 27 forward passes",
        "`tokenizer/` is tiny-raster's. Each word of a caption is a channel of the text features, so that the model's "
        "projection is what embeds it. `captions.json` has the thirds of thickness and slant that the captions name.",
    ),
    "tiny-nar-video": (
        "decodes grey clips of 8 frames of 28 x 28 pixels by digit, on a grid of 4 x 7 x 7 tokens from its top right "
        "corner, in 16 forward passes",
        "`tokenizer/` is a `PatchTokenizer` of blocks of 2 frames by 4 by 4 pixels, by k-means. `classifier/` tells "
        "digit and direction of a clip; distances are to what it sees in held-out clips as their tokens show "
        "them. `compared/` holds a raster model and a single-head NAR of the same backbone, "
        "trained by the same recipe for as many steps.",
    ),
}


def card(name: str, further: int, lock: Lock) -> str:
    """The model card as Markdown; every figure comes from the lock but ``further``, the layers on top for the heads."""
    plan, scores = lock["plan"], lock["scores"]
    training = plan["training"]
    what, parts = _ABOUT[name]
    rows = [["transformer, nats a token", f"{scores['held_out_nats_per_token']:.4f}"]]
    for key, label in (
        ("classifier_accuracy", "classifier, % of digits right"),
        ("direction_accuracy", "classifier, % of directions right"),
        ("classifier_accuracy_reconstructed", "classifier, % of digits right on reconstructions"),
    ):
        if key in scores:
            rows.append([f"{label} [95 % Wilson]", percent(scores[key], digits=2)])
    if "reconstruction_mse" in scores:
        rows.append(["tokenizer, mean squared error", f"{scores['reconstruction_mse']:.6f}"])
    kind = "clips" if "video" in name else "images"
    for key, label in (("real", f"other real {kind}"), ("reconstructed", "of their reconstructions")):
        if "frechet_floors" in scores:
            count = scores["frechet_floors"]["images"]
            rows.append([f"Fréchet distance of {count:,} {label}", spread(scores["frechet_floors"][key])])
    return "\n".join(
        [
            f"# {name}",
            "",
            f"A `tersor.grids.nar.NARForImageGeneration` with {lock['parameters']:,} parameters ({plan['layers']} "
            f"layers and {further} more for the heads, width {plan['hidden']}, {plan['heads']} heads) that "
            f"{what}. Weights are stored in bfloat16. It was trained without its condition for "
            f"{100 * plan['dropout']:.0f} % of the samples, so it takes guidance; by default there is none.",
            "",
            parts,
            "",
            "## Scores on held-out samples",
            "",
            *markdown(("what", "score"), rows),
            "",
            "Samples are measured by `tersor bench nar`; see the documentation.",
            "",
            "## Training",
            "",
            f"`python {lock['recipe']} --data FOLDER --out OUT`, seed {training['seed']}: {training['steps']:,} steps "
            f"of {training['batch_size']} samples on {lock['machine']['gpu'] or lock['machine']['cpu']}. "
            f"Data: {lock['data']}, shuffled; one image in seven is held out.",
            "",
            *markdown(
                ("step", "held out"), ((row["step"], f"{row['eval_loss']:.4f}") for row in lock["curve"]), names=0
            ),
            "",
        ]
    )

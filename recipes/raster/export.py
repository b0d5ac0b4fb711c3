"""Scores, floors, checkpoint folder, lock file and model card of tiny-raster."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from raster.data import Split
from raster.train import Trainer, held_out_loss
from shared.lock import percent, share_of, write_lock
from torch import Tensor

from tersor.bench.runs import markdown
from tersor.grids.judge import DigitClassifier, Reference, save_judge
from tersor.grids.tokenizer import PatchTokenizer

#: Sets of training images, and of their reconstructions, that the floors of the Fréchet distance are taken from.
FLOOR_SETS = 3


def floors(
    classifier: DigitClassifier,
    reference: Reference,
    tokenizer: Any,
    pixels: Tensor,
    *,
    images: int,
    sets: int = FLOOR_SETS,
) -> dict[str, list[float]]:
    """Fréchet distance to held-out images or clips of sets of real ones that are not among them, and reconstructed.

    Args:
        classifier: Sees features in pixels.
        reference: What it saw in held-out ones.
        tokenizer: Makes the reconstructions.
        pixels: In random order; enough for ``sets`` sets of ``images``.
        images: Size of a set.
        sets: How many distances are taken.
    """
    found: dict[str, list[float]] = {"real": [], "reconstructed": []}
    for index in range(sets):
        real = pixels[index * images : (index + 1) * images]
        for name, each in (("real", real), ("reconstructed", tokenizer.decode(tokenizer.encode(real)))):
            features, _ = classifier.judge(each)
            found[name].append(round(reference.distance(features), 4))
    return found


def export(
    trainer: Trainer,
    tokenizer: PatchTokenizer,
    judge: tuple[DigitClassifier, Reference],
    split: Split,
    *,
    out: Path,
    floor_images: int,
) -> dict[str, Any]:
    """Write the checkpoint folder ``out`` and return the lock: bfloat16 weights, scored as they will be loaded."""
    classifier, reference = judge
    rounded = trainer.model.to(torch.bfloat16)
    rounded.save_pretrained(out)
    tokenizer.save_pretrained(out / "tokenizer")
    save_judge(out / "classifier", classifier, reference)
    _, guesses = classifier.judge(split.held_out)
    restored = tokenizer.decode(tokenizer.encode(split.held_out))
    loss = held_out_loss(rounded.float(), trainer.held_out_ids[:2000], trainer.held_out_labels[:2000])
    lock = {
        "recipe": "recipes/tiny_raster.py", "data": split.source, "sha256": split.sha256, "seed": trainer.seed,
        "plan": asdict(trainer.plan), "minutes": round(trainer.progress.seconds / 60, 1),
        "parameters": sum(p.numel() for p in rounded.parameters()),
        "scores": {
            "held_out_nats_per_token": round(loss, 4),
            "reconstruction_mse": round((restored - split.held_out).square().mean().item(), 6),
            "classifier_accuracy": share_of(int((guesses == split.held_out_labels).sum()), len(split.held_out)),
            "frechet_floors": {
                "images": floor_images, **floors(classifier, reference, tokenizer, split.train, images=floor_images),
            },
        },
        "curve": trainer.progress.curve,
    }  # fmt: skip
    return write_lock(out, lock, card)


def card(lock: dict[str, Any]) -> str:
    """The model card as Markdown; every figure comes from the lock."""
    scores, plan = lock["scores"], lock["plan"]
    floor = scores["frechet_floors"]
    return "\n".join(
        [
            "# tiny-raster",
            "",
            f"A `tersor.grids.llamagen.LlamaGen` with {lock['parameters']:,} parameters ({plan['layers']} layers, "
            f"width {plan['hidden']}, {plan['heads']} heads) that decodes grey images of 28 x 28 pixels by class, "
            "token by token in raster order, on a grid of 14 x 14. Weights are stored in bfloat16. It was trained "
            f"without the class for {100 * plan['dropout']:.0f} % of the samples, so it takes "
            "guidance; by default there is none.",
            "",
            f"`tokenizer/` is a `PatchTokenizer`: {plan['codebook']} patches of {plan['patch']} x {plan['patch']} "
            "pixels, by k-means. `classifier/` is the `DigitClassifier` that samples are judged by, with mean and "
            "covariance of its features and the class over the held-out images.",
            "",
            "## Scores on held-out images",
            "",
            *markdown(
                ("what", "score"),
                (
                    ("transformer, nats a token", f"{scores['held_out_nats_per_token']:.4f}"),
                    ("tokenizer, mean squared error", f"{scores['reconstruction_mse']:.6f}"),
                    ("classifier, % right [95 % Wilson]", percent(scores["classifier_accuracy"], digits=2)),
                    (f"Fréchet distance of {floor['images']:,} other real images", spread(floor["real"])),
                    ("and of their reconstructions", spread(floor["reconstructed"])),
                ),
            ),
            "",
            "## Training",
            "",
            f"`python recipes/tiny_raster.py --data FOLDER --out OUT`, seed {lock['seed']}: {plan['steps']:,} steps of "
            f"{plan['batch']} images in {lock['minutes']:.0f} minutes on {lock['machine']['cores']} cores "
            f"({lock['machine']['cpu']}). Data: {lock['data']}, shuffled; one image in seven is held out.",
            "",
            *markdown(("step", "minutes", "loss", "held out"), (row.values() for row in lock["curve"]), names=0),
            "",
        ]
    )


def spread(values: list[float]) -> str:
    """Mean of several distances, with the least and the largest."""
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"

"""Rebuild tiny-lm-tied: tiny-lm whose deep layers cache alike in pairs, so that MiniCache's premise holds.

    python recipes/tiny_lm_tied.py --out OUT [--data BOOKS]

starts from the zoo's tiny-lm, ties what makes keys and values inside three pairs of layers, and trains on for about
five minutes on two CPU cores; it resumes where it was when started again. Books as in tiny_lm.py.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm.cli import arguments, note_progress, trainer_of
from lm.data import Books
from lm.evaluation import bits_per_byte
from lm.export import SAMPLES, curve_table, export, recall_table
from lm.train import Phase, Plan, Progress, Trainer
from shared.lock import Lock, write_lock
from shared.run import refused
from torch import Tensor
from transformers import LlamaForCausalLM

from tersor import zoo
from tersor.bench.runs import markdown
from tersor.kv.depth.similarity import analyze_layer_similarity

#: Layers 0 and 1 are the copying circuit and stay as they are.
PAIRS = ((2, 3), (4, 5), (6, 7))
TIED = ("self_attn.k_proj.weight", "self_attn.v_proj.weight", "input_layernorm.weight")
PLAN = Plan(
    phases=(
        Phase(length=520, size=8, rows=2, steps=60, dense=0.5, noise=0.6),
        Phase(length=1056, size=6, rows=1, steps=90, dense=0.4, noise=0.6),
    ),
    rate_peak=6e-4,
    warmup=20,
    decay=0.6,
)
SMOKE = Plan(phases=(Phase(length=200, size=2, rows=1, steps=6, dense=0.5, noise=0.6),), rate_peak=6e-4, warmup=2)


def tied_weights(model: LlamaForCausalLM) -> list[tuple[Tensor, Tensor]]:
    """The parameters that must be equal, earlier layer first."""
    layers = model.model.layers
    return [(layers[i].get_parameter(name), layers[j].get_parameter(name)) for i, j in PAIRS for name in TIED]


@torch.no_grad()
def tie(model: LlamaForCausalLM) -> None:
    """Start both layers of a pair from the mean of their weights."""
    for one, other in tied_weights(model):
        mean = (one + other) / 2
        one.copy_(mean)
        other.copy_(mean)


def average_gradients(model: LlamaForCausalLM) -> None:
    """Give both layers of a pair the same gradient, so that equal weights stay equal."""
    for one, other in tied_weights(model):
        one.grad = other.grad = (one.grad + other.grad) / 2


class TiedTrainer(Trainer):
    """Trains on from the zoo's tiny-lm; the two copies of a tied weight stay equal bit for bit."""

    def __init__(self, books: Books, plan: Plan, seed: int, state: Path, **options: Any) -> None:
        super().__init__(books, plan, seed, state, **options)
        if self.progress.step == 0:
            self.model.load_state_dict(zoo.load_model("tiny-lm").state_dict())
            tie(self.model)
        self.optimizer.register_step_pre_hook(lambda *_: average_gradients(self.model))


def similarity(model: LlamaForCausalLM, prose: str, *, length: int, rows: int = 8) -> list[dict[str, Any]]:
    """What `analyze_layer_similarity` finds on windows of held-out prose."""
    starts = range(0, len(prose) - length, (len(prose) - length) // rows)
    ids = torch.tensor([list(prose[s : s + length].encode("ascii")) for s in list(starts)[:rows]])
    return [asdict(row) for row in analyze_layer_similarity(model, ids).rows]


def card(progress: Progress, lock: Lock) -> str:
    """The model card as Markdown; every figure comes from the lock or the training curve."""
    scores, pairs = lock["scores"], ", ".join(f"({i}, {j})" for i, j in lock["pairs"])
    by_pair: dict[tuple[int, int], dict[str, dict[str, float]]] = {}
    for name in ("similarity", "similarity of tiny-lm"):
        for row in lock[name]:
            by_pair.setdefault(tuple(row["layers"]), {})[f"{name} {row['kind']}"] = row
    columns = [f"{name} {kind}" for name in ("similarity", "similarity of tiny-lm") for kind in ("keys", "values")]
    return "\n".join(
        [
            "# tiny-lm-tied",
            "",
            f"tiny-lm whose layers {pairs} hold equal key and value projections and input norms, so that the two "
            "layers of a pair cache nearly the same. It exists to measure MiniCache where its premise, similar "
            "neighbouring layers, holds; in tiny-lm itself, as in most small models, it does not. A "
            "`LlamaForCausalLM` like any other: both copies are stored.",
            "",
            "## Similarity of neighbouring layers",
            "",
            "Mean cosine between the layers' keys and values, token by token and head by head, on a book that neither "
            "model saw.",
            "",
            *markdown(
                ("layers", "keys", "values", "keys in tiny-lm", "values in tiny-lm"),
                (
                    (f"{pair[0]}, {pair[1]}", *(f"{rows[column]['mean_cosine']:.3f}" for column in columns))
                    for pair, rows in sorted(by_pair.items())
                ),
            ),
            "",
            "## Scores on a book that it never saw",
            "",
            f"*Treasure Island*; exact answers, greedy; {scores['recall']['1024']['needle']['n']} questions a task and "
            "length; 95 % Wilson intervals.",
            "",
            *recall_table(scores),
            "",
            f"Prose: {scores['bits_per_byte']:.3f} bits per byte over windows of 1,024 bytes, read from a cold start; "
            f"tiny-lm: {lock['bits_per_byte of tiny-lm']:.3f}.",
            "",
            "## Training",
            "",
            f"`python recipes/tiny_lm_tied.py --out OUT`, seed {lock['seed']}: {lock['steps']:,} steps from tiny-lm in "
            f"{lock['minutes']:.0f} minutes on {lock['machine']['cores']} cores ({lock['machine']['cpu']}). Tied "
            "weights start from the mean of the two layers and share their gradients. Data as for tiny-lm.",
            "",
            *curve_table(progress),
            "",
            "Validation books, 24 questions a task and row. Licence: Apache-2.0, the books are in the public domain.",
            "",
        ]
    )


def export_tied(trainer: Trainer, *, seed: int, out: Path, samples: int, length: int) -> dict[str, Any]:
    """Write the checkpoint folder as `export` does, with the similarities in lock and card."""
    books = trainer.books
    lock = export(trainer.model, books, trainer.plan, trainer.progress, seed=seed, out=out, samples=samples)
    start = zoo.load_model("tiny-lm")
    lock |= {
        "recipe": "recipes/tiny_lm_tied.py",
        "pairs": [list(pair) for pair in PAIRS],
        "tied": list(TIED),
        "similarity": similarity(trainer.model, books.test, length=length),
        "similarity of tiny-lm": similarity(start, books.test, length=length),
        "bits_per_byte of tiny-lm": round(bits_per_byte(start, books.test), 4),
    }
    return write_lock(out, lock, partial(card, trainer.progress))


def main(argv: list[str] | None = None) -> int:
    """Tie, train, score and export; returns the exit code."""
    args = arguments("tiny-lm-tied", argv)
    try:
        trainer = trainer_of(args, TiedTrainer, SMOKE if args.smoke else PLAN)
    except (ValueError, OSError) as error:
        return refused("tiny_lm_tied", error)

    def look(trainer: Trainer, loss: float) -> None:
        questions, context = (4, 192) if args.smoke else (24, 1024)
        note_progress(trainer, loss, questions=questions, context=context, length=context)

    trainer.run(look=look, look_every=3 if args.smoke else 50)
    lock = export_tied(
        trainer,
        seed=args.seed,
        out=args.out / "tiny-lm-tied",
        samples=8 if args.smoke else SAMPLES,
        length=192 if args.smoke else 1024,
    )
    print(lock["scores"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

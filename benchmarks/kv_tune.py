"""What `tersor tune` finds on small trained models, beside every single setting at the same budget.

    python benchmarks/kv_tune.py --model tiny-lm --budget 4.5 --out benchmarks/results/tune.jsonl

Models are those of the zoo, and ``tiny-lm-planted``: tiny-lm whose layer 5 caches values that a common part dominates
(`with_common_values`), which changes no output of the uncompressed model. The texts are the held-out book; half of the
pieces choose, and the figures are of the other half. What is told of planted facts is recall after compression, as
`tersor bench kv` asks, on no text that was tuned on but of the same book.

Rows of other models and budgets in ``--out`` stay.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from turns import command_of, show_records

from tersor import zoo
from tersor.bench.records import Record, read_jsonl
from tersor.bench.runs import record_maker, report_records
from tersor.kv.bench.contenders import Contender
from tersor.kv.bench.recall import Scores, pooled, score_recall
from tersor.kv.bench.tasks import PLANTED, recall_samples
from tersor.kv.tune.pieces import cut, halves
from tersor.kv.tune.run import Tuning, tune

#: Tokens of a piece, as `tersor tune` cuts them.
TOKENS = 1024
PLANTED_MODEL, PLANTED_LAYER = "tiny-lm-planted", 5


@torch.no_grad()
def with_common_values(model: PreTrainedModel, layer: int, factor: float = 64.0) -> PreTrainedModel:
    """A copy that computes the same, but caches values of ``layer`` that share one large part.

    Every value vector ``v`` of a head becomes ``M v`` with ``M = I + (factor / d) a s^T``: how much of ``s`` is in
    ``v`` is added to all channels, by the weights ``a``. The output projection takes it back: ``a`` and ``s`` are
    orthogonal, so that the inverse is ``I - (factor / d) a s^T``. Values are rounded by the range of a token's
    channels, which that part makes wide.
    """
    model = copy.deepcopy(model)
    attention = model.get_decoder().layers[layer].self_attn
    dim, value, output = attention.head_dim, attention.v_proj.weight, attention.o_proj.weight
    part = torch.outer(torch.linspace(-1, 1, dim), torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(dim // 4))
    mix = torch.eye(dim) + factor / dim * part
    value.copy_(torch.cat([mix @ rows for rows in value.split(dim)]))
    output.copy_(torch.cat([columns @ (2 * torch.eye(dim) - mix) for columns in output.split(dim, dim=1)], dim=1))
    return model


def load(name: str) -> tuple[PreTrainedModel, Any]:
    """A model of the zoo or the planted one, and its tokenizer."""
    model, tokenizer = zoo.load("tiny-lm" if name == PLANTED_MODEL else name)
    return with_common_values(model, PLANTED_LAYER) if name == PLANTED_MODEL else model, tokenizer


def recall_of(model: PreTrainedModel, tokenizer: Any, tuning: Tuning, *, samples: int, seed: int) -> dict[str, Scores]:
    """Recall of planted facts by every setting of ``tuning``, over all tasks together."""
    rivals = [Contender(each.name, "", each.recipe.cache) for each in tuning.settings]
    results = {
        task: score_recall(
            model, tokenizer.encode, recall_samples(task, n=samples, prose=zoo.book(), seed=seed), rivals
        )
        for task in PLANTED
    }
    return pooled(results)


def records_of(
    tuning: Tuning, recall: dict[str, Scores], seconds: float, arguments: argparse.Namespace, words: list[str] | None
) -> list[Record]:
    """Rows of every setting, the chosen one first."""
    make = record_maker("kv tune", model=arguments.model, seed=arguments.seed, command=command_of("kv_tune", words))
    chosen, records = tuning.settings[0], []
    for each in tuning.settings:
        own, n = each.held_out, len(each.held_out.added)
        item = f"{each.name}: {arguments.budget:g}x"
        records += [
            make(item, "compression of a 16-bit cache", "x", own.ratio, n, baseline=1.0),
            make(item, "divergence", "nats per token", own.mean, n, baseline=0.0),
            make(item, "added loss", "nats per token", own.added_loss(), n, baseline=0.0),
            make(item, "more than chosen", "nats per token", own.against(chosen.held_out), n, baseline=0.0),
        ]
        if each.name in recall:
            records.append(make(item, "recall", "share", recall[each.name].mean(), len(recall[each.name].values)))
    if (widths := tuning.widths()) is not None:
        for index, (keys, values) in enumerate(widths):
            item = f"layer {index}: {arguments.budget:g}x"
            records += [make(item, "key bits", "bits", float(keys), None)]
            records += [make(item, "value bits", "bits", float(values), None)]
    return [*records, make(f"search: {arguments.budget:g}x", "time", "s", seconds, None)]


def main(words: list[str] | None = None) -> int:
    """Search, compare and write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-lm", choices=["tiny-lm", "tiny-lm-tied", PLANTED_MODEL])
    parser.add_argument("--budget", type=float, default=4.5)
    parser.add_argument("--pieces", type=int, default=64)
    parser.add_argument("--samples", type=int, default=25, help="Questions a task of planted facts; 0 asks none.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load(arguments.model)
    pieces = halves(cut([zoo.book()], tokenizer, TOKENS), arguments.pieces, arguments.seed)
    start = time.perf_counter()
    tuning = tune(model, pieces, arguments.budget)
    seconds = time.perf_counter() - start
    recall: dict[str, Scores] = {}
    if arguments.samples:
        recall = recall_of(model, tokenizer, tuning, samples=arguments.samples, seed=arguments.seed + 1)
    records = records_of(tuning, recall, seconds, arguments, words)
    kept = read_jsonl(arguments.out) if arguments.out is not None and arguments.out.is_file() else []
    own = f": {arguments.budget:g}x"
    kept = [each for each in kept if (each.model, each.item[-len(own) :]) != (arguments.model, own)]
    report_records([*kept, *records], arguments.out, False, lambda: show_records(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())

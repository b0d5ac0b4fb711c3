"""Passes of speculative decoding on plain text, as one row of tokens, by tiny-lm.

    python benchmarks/speculative_text.py --out benchmarks/results/speculative_text.jsonl

The prompts are parts of the embedded held-out book. Whether the texts are those of the model's own
``generate`` is counted too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from turns import command_of, show_records

import tersor
from tersor import zoo
from tersor.bench.measure import bootstrap_interval
from tersor.bench.records import Record, write_jsonl
from tersor.bench.runs import record_maker

MODEL, WINDOW = "tiny-lm", 8
SAMPLING = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "top_k": 0}}


def main(argv: list[str] | None = None) -> list[Record]:
    """Generate, count, print and write; returns the records."""
    parser = argparse.ArgumentParser(description="Passes of speculative decoding on text.")
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    model, tokenizer = zoo.load(MODEL)
    prose = zoo.book()
    record = record_maker("zipar", model=MODEL, seed=0, command=command_of("speculative_text", argv))
    records = []
    for name, sampling in SAMPLING.items():
        passes, same = [], []
        for number in range(args.texts):
            ids = tokenizer(prose[4_000 * number :][:256], return_tensors="pt").input_ids
            torch.manual_seed(number)
            expected = model.generate(ids, max_new_tokens=args.tokens, **sampling)
            torch.manual_seed(number)
            out = tersor.speculative_generate(
                model,
                ids,
                grid_size=(1, args.tokens),
                window_size=WINDOW,
                first_drafts="left",
                return_dict_in_generate=True,
                **sampling,
            )
            passes.append(out.forward_passes)
            # The model may end its text, which an image never does.
            same.append(float(torch.equal(out.sequences[:, : expected.shape[1]], expected)))
        item, n = f"text of {args.tokens} tokens, window {WINDOW}: {name}", args.texts
        records += [
            record(item, "forward passes", "passes", bootstrap_interval(passes), n, baseline=float(args.tokens)),
            record(item, "texts equal to generate's", "share", sum(same) / n, n, baseline=1.0),
        ]
    show_records(records)
    if args.out is not None:
        write_jsonl(args.out, records)
    return records


if __name__ == "__main__":
    main()
    sys.exit(0)

"""What the cache engine itself costs on this CPU, paired in one run.

    python benchmarks/kv_engine.py --out benchmarks/results/kv_engine.jsonl

1. A decoding step: CPU time of one thread a layer, ZipCache over the library's cache, early and late, in blocks
   of steps that take turns; full windows are in them.
2. Probes: time that scoring a prompt's tokens takes, over the causal attention of the same prompt.
3. A long prompt: peak of the process's memory above the model, each cache in a process of its own.

Records go to ``--out`` after each part, a table to the terminal.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from turns import command_of, show_records

from tersor._compat import with_cache
from tersor.bench.measure import machine, time_paired
from tersor.bench.records import Record, write_jsonl
from tersor.bench.runs import record_maker
from tersor.kv.minicache import MiniCache
from tersor.kv.recipe import Recipe
from tersor.kv.selection.probes import Queries, probe_scores
from tersor.kv.zipcache import ZipCache

#: Steps of a block, more than one full window of 100 tokens in five blocks.
BLOCK = 20
#: Query heads, KV heads, channels and tokens of the prompts whose probes are timed.
PROMPTS = ((32, 8, 128, 4096), (32, 8, 128, 8192), (8, 8, 32, 8192))
FULL = "DynamicCache"
#: Caches whose peak is measured, and the tokens of a chunk of the prompt.
PEAKS: dict[str, tuple[Recipe | None, int | None]] = {
    FULL: (None, None),
    "uniform 4 bits": (ZipCache(saliency_ratio=1.0), None),
    "ZipCache 4/2": (ZipCache(), None),
    "ZipCache 4/2 in chunks of 1,024": (ZipCache(), 1024),
    "MiniCache": (MiniCache(max_relative_error=2.0), None),
}


def model_of(layers: int, hidden: int, heads: tuple[int, int], seed: int) -> LlamaForCausalLM:
    """A random Llama."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], max_position_embeddings=131_072,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def step_records(args: argparse.Namespace, record: Callable[..., Record]) -> list[Record]:
    """CPU time a layer and step of both caches, and their ratio, after some decoded tokens."""
    records = []
    model, recipe = model_of(args.layers, 64, (4, 2), args.seed), ZipCache()
    ids = torch.randint(0, 64, (1, args.prompt), generator=torch.Generator().manual_seed(args.seed))
    caches: dict[str, Any] = {FULL: DynamicCache(config=model.config), "ZipCache 4/2": recipe.cache(model.config)}
    token = ids[:, -1:]

    def run(name: str, steps: int) -> None:
        with nullcontext() if name == FULL else recipe.on(model):
            for _ in range(steps):
                model(token, **with_cache(caches[name]))

    for name, cache in caches.items():
        with nullcontext() if name == FULL else recipe.on(model):
            model(ids, logits_to_keep=1, **with_cache(cache))
    decoded = 0
    for start in args.steps:
        for name in caches:
            run(name, start - decoded)
        turns = {name: (lambda name=name: run(name, BLOCK)) for name in caches}
        times = time_paired(turns, repeats=args.repeats, warmup=1, seed=args.seed, clock=time.process_time)
        decoded = start + (1 + args.repeats) * BLOCK
        where = f"decoding step, {args.layers} layers, prompt of {args.prompt:,}, after {start:,} tokens"
        for name in caches:
            value = times.seconds(name) * (1e6 / BLOCK / args.layers)
            records.append(record(f"{where}: {name}", "CPU time a layer", "us", value, args.repeats))
        ratio = times.ratio("ZipCache 4/2", FULL)
        records.append(record(f"{where}: ZipCache 4/2", f"CPU time over {FULL}", "x", ratio, args.repeats))
    return records


@torch.no_grad()
def probe_records(args: argparse.Namespace, record: Callable[..., Record]) -> list[Record]:
    """Time of the probes that `ZipCache` takes by default, over the attention of the prompt."""
    records = []
    selection = ZipCache().method().selection
    for heads, kv_heads, dim, tokens in args.shapes:
        generator = torch.Generator().manual_seed(args.seed)
        query = torch.randn(1, heads, tokens, dim, generator=generator)
        keys, values = (torch.randn(1, kv_heads, tokens, dim, generator=generator) for _ in range(2))
        rows, queries = selection.probe_rows(tokens, layer=0, segment=0), Queries(query, dim**-0.5)

        def attend(query: Any = query, keys: Any = keys, values: Any = values) -> None:
            F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)

        def probe(queries: Any = queries, keys: Any = keys, rows: Any = rows) -> None:
            probe_scores(queries, keys, None, None, lambda length: rows, per_head=False)

        times = time_paired({"attention": attend, "probes": probe}, repeats=args.repeats, seed=args.seed)
        item = f"prompt of {tokens:,} tokens, {heads} heads and {kv_heads} KV heads of {dim}: probes"
        share = times.ratio("probes", "attention") * 100
        records.append(record(item, "time over the prompt's attention", "%", share, args.repeats))
    return records


def peak_records(args: argparse.Namespace, record: Callable[..., Record]) -> list[Record]:
    """Peak memory of a prompt by cache, and over that of uniform 4 bits."""
    # Freed memory goes back to the system at once, so that the process's size shows what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    shape = ["--peak-tokens", str(args.peak_tokens), "--layers", str(args.layers), "--seed", str(args.seed)]
    peaks = {}
    for name in PEAKS:
        command = [sys.executable, __file__, "--peak-of", name, *shape]
        printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        peaks[name] = int(printed.splitlines()[-1])
    records = []
    for name, peak in peaks.items():
        item = f"prompt of {args.peak_tokens:,} tokens, {args.layers} layers, 8 KV heads of 32: {name}"
        records.append(record(item, "peak memory above the model", "MiB", peak / 2**20, 1))
        records.append(record(item, "peak over uniform 4 bits", "x", peak / max(peaks["uniform 4 bits"], 1), 1))
    return records


@torch.no_grad()
def peak_of(name: str, args: argparse.Namespace) -> int:
    """Bytes by which this process grows while a cache reads a prompt; Linux alone tells."""
    model = model_of(args.layers, 256, (8, 8), args.seed)
    recipe, chunk = PEAKS[name]
    ids = torch.randint(0, 64, (1, args.peak_tokens), generator=torch.Generator().manual_seed(args.seed))
    pages, done, most = os.sysconf("SC_PAGE_SIZE"), threading.Event(), [0]

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * pages

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], resident())

    def read(tokens: torch.Tensor, size: int | None) -> None:
        with nullcontext() if recipe is None else recipe.on(model):
            cache = DynamicCache(config=model.config) if recipe is None else recipe.cache(model.config)
            for part in tokens.split(size or tokens.shape[1], dim=1):
                model(part, logits_to_keep=1, **with_cache(cache))

    read(ids[:, :300], None)  # what is built and loaded once
    before, watcher = resident(), threading.Thread(target=watch)
    watcher.start()
    read(ids, chunk)
    done.set()
    watcher.join()
    return max(most[0] - before, 0)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens before the decoding steps")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 2000], help="decoded tokens before the blocks")
    parser.add_argument("--peak-tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-of", choices=list(PEAKS), help="measure one cache's peak and print its bytes")
    parser.add_argument("--out", type=Path, help="JSON lines of records")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, shapes: tuple[tuple[int, int, int, int], ...] = PROMPTS) -> int:
    """Measure, print and write; returns the exit code."""
    args = arguments(argv)
    torch.set_num_threads(1)
    if args.peak_of:
        print(peak_of(args.peak_of, args))
        return 0
    args.shapes = shapes
    record = record_maker(
        "kv engine", seed=args.seed, model="Llama shapes", shapes="random", command=command_of("kv_engine", argv),
        machine=machine() | {"threads": 1},
    )  # fmt: skip
    records: list[Record] = []
    for part in (step_records, probe_records, peak_records):
        records += part(args, record)
        if args.out:
            write_jsonl(args.out, records)
    show_records(records)
    return 0


if __name__ == "__main__":
    sys.exit(main())

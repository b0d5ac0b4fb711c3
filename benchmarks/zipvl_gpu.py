"""Prefill, decoding and memory of sparse prefills on a model of Qwen2.5-VL-7B's shape with random weights.

    python benchmarks/zipvl_gpu.py --out benchmarks/results/zipvl_gpu.jsonl

The decoder reads prompts of 32k and 128k tokens densely and at given shares of tokens in attention, in turns. Random
weights attend almost evenly, so a share is set instead of being found from ``tau``; probing, choosing, gathering and
eviction are ZipVL's own. 0.421 is the share that the paper reports for LongVA-7B on 128 frames. On a CPU, ``--device
cpu`` with small ``--layers``, ``--hidden`` and ``--lengths`` runs the same code without a statement about speed.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import Cache, DynamicCache

from tersor.bench.measure import PairedTimes, machine, storage_bytes, time_paired, versions
from tersor.bench.records import Record, write_jsonl
from tersor.kv.bench.peers.sparse import fixed_share
from tersor.kv.method import KVMethod

DENSE = "dense, SDPA"
CLAIM, CLAIM_SOURCE, CLAIM_SHARE, CLAIM_TOKENS = 2.6, "prefill speed-up, arXiv 2410.08584 v1, LongVA-7B", 0.421, 32768


@dataclass
class Measured:
    """What one method took at one length: seconds by round, bytes; ``failure`` says why there is nothing."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    cache_bytes: int = 0
    peak_bytes: int | None = None
    failure: str | None = None


def decoder(layers: int, hidden: int, device: str) -> Qwen2ForCausalLM:
    """Qwen2.5-VL-7B's text decoder for 28 layers of width 3584; other widths keep its proportions."""
    heads = max(4, hidden // 128)
    config = Qwen2Config(
        vocab_size=152064, hidden_size=hidden, intermediate_size=hidden * 37 // 7, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=4, max_position_embeddings=131072 + 1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    with torch.device(device):
        return Qwen2ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


@torch.inference_mode()
def run_once(
    model: Qwen2ForCausalLM, method: KVMethod | None, ids: Tensor, steps: int, synchronize: Callable[[], None]
) -> tuple[float, float, Cache]:
    """Prefill ``ids`` and decode ``steps`` tokens: seconds of the prompt, seconds a token, the filled cache."""
    with nullcontext() if method is None else method.on(model):
        cache = DynamicCache(config=model.config) if method is None else method.cache(model.config)
        synchronize()
        start = time.perf_counter()
        token = model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        synchronize()
        prefilled = time.perf_counter()
        for _ in range(steps):
            token = model(token, past_key_values=cache).logits.argmax(-1)
        synchronize()
        return prefilled - start, (time.perf_counter() - prefilled) / steps, cache


def measure_length(model: Qwen2ForCausalLM, tokens: int, options: argparse.Namespace) -> dict[str, Measured]:
    """Every method on one prompt; the first run of each finds out whether it fits and how much it takes."""
    on_gpu = model.device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator).to(model.device)
    methods: dict[str, KVMethod | None] = {DENSE: None}
    methods |= {name_of(share): fixed_share(share) for share in options.shares}
    results = {name: Measured() for name in methods}
    turns: dict[str, Callable[[], None]] = {}
    for name, method in methods.items():

        def turn(method: KVMethod | None = method, result: Measured = results[name]) -> None:
            prefill, decode, _ = run_once(model, method, ids, options.steps, synchronize)
            result.prefill.append(prefill)
            result.decode.append(decode)

        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            cache = run_once(model, method, ids, options.steps, synchronize)[2]
        except torch.OutOfMemoryError:
            results[name].failure = "out of memory"
            continue
        stores = [each.owned() if hasattr(each, "owned") else (each.keys, each.values) for each in cache.layers]
        results[name].cache_bytes = storage_bytes(stores)
        results[name].peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else None
        del cache, stores
        turns[name] = turn
    if turns:
        time_paired(turns, repeats=options.repeats, warmup=0, seed=options.seed)
    return results


def name_of(share: float) -> str:
    """A sparse prefill in reports."""
    return f"sparse prefill, {share:.1%} of tokens"


def length_records(results: dict[str, Measured], tokens: int, shared: dict[str, Any]) -> list[Record]:
    """Latency and bytes of every method, and each one's speed-up over the dense one."""
    plain = {
        "claim": None, "claim_source": None, "verdict": None, "peer": None, "peer_name": None, "baseline": None,
        "low": None, "high": None, "interval": None,
    }  # fmt: skip
    done = {name: each for name, each in results.items() if each.failure is None}
    rows: list[dict[str, Any]] = []
    for part, unit in (("prefill", "ms"), ("decode", "ms per token")):
        times = PairedTimes({name: tuple(getattr(each, part)) for name, each in done.items()})
        for name in done:
            each = times.seconds(name)
            rows.append(
                {"item": name, "quantity": f"{part} latency", "unit": unit, "measured": each.value * 1e3,
                 "low": each.low * 1e3, "high": each.high * 1e3, "interval": each.interval}
            )  # fmt: skip
            if name == DENSE or DENSE not in done:
                continue
            ratio = times.ratio(DENSE, name)
            rows.append(
                {"item": name, "quantity": f"{part} speed-up", "unit": "x", "measured": ratio.value,
                 "low": ratio.low, "high": ratio.high, "interval": ratio.interval, "baseline": 1.0}
            )  # fmt: skip
            on_gpu = done[name].peak_bytes is not None
            if part == "prefill" and on_gpu and tokens == CLAIM_TOKENS and name == name_of(CLAIM_SHARE):
                verdict = "holds" if ratio.value >= CLAIM else "partly" if ratio.low > 1 else "fails"
                rows[-1] |= {"claim": CLAIM, "claim_source": CLAIM_SOURCE, "verdict": verdict}
    for name, each in done.items():
        for quantity, value in (("cache memory", each.cache_bytes), ("peak memory", each.peak_bytes)):
            if value is not None:
                rows.append({"item": name, "quantity": quantity, "unit": "bytes", "measured": float(value)})
    return [Record(**(plain | shared | row | {"item": f"{row['item']}: {tokens} tokens"})) for row in rows]


def print_table(lengths: dict[int, dict[str, Measured]]) -> None:
    """One row a method and length."""
    table = Table("tokens", "attention", box=box.SIMPLE_HEAD)
    for title in ("prefill, ms", "decode, ms a token", "cache, MiB", "peak memory, MiB"):
        table.add_column(title, justify="right")
    for tokens, results in lengths.items():
        for name, each in results.items():
            if each.failure is not None:
                table.add_row(f"{tokens:,}", name, each.failure)
                continue
            medians = [
                PairedTimes({name: tuple(part)}).seconds(name).value * 1e3 for part in (each.prefill, each.decode)
            ]
            peak = "" if each.peak_bytes is None else f"{each.peak_bytes / 2**20:,.0f}"
            cells = [*(f"{median:,.1f}" for median in medians), f"{each.cache_bytes / 2**20:,.1f}", peak]
            table.add_row(f"{tokens:,}", name, *cells)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Run the benchmark for command-line ``arguments`` and return its records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.795, 0.528, CLAIM_SHARE])
    parser.add_argument("--steps", type=int, default=64, help="tokens to decode in a round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write records here after every length")
    options = parser.parse_args(arguments)
    if min(options.steps, options.repeats, *options.lengths) < 1 or not all(0 < share < 1 for share in options.shares):
        parser.error("--steps, --repeats and --lengths must be at least 1, --shares between 0 and 1")
    model = decoder(options.layers, options.hidden, options.device)
    shared = {
        "system": "zipvl", "n": options.repeats, "seed": options.seed, "model": "Qwen2.5-VL-7B decoder shape",
        "shapes": f"random; {options.layers} layers, hidden {options.hidden}", "versions": versions(),
        "machine": machine(),
        "command": shlex.join(["python", "benchmarks/zipvl_gpu.py", *(arguments or sys.argv[1:])]),
    }  # fmt: skip
    lengths, records = {}, []
    for tokens in options.lengths:
        lengths[tokens] = measure_length(model, tokens, options)
        records += length_records(lengths[tokens], tokens, shared)
        if options.out is not None:
            write_jsonl(options.out, records)
    print_table(lengths)
    return records


if __name__ == "__main__":
    main()

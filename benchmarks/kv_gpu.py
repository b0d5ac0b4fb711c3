"""Latency and memory of KV caches on a Llama-3-8B-shaped model with random weights.

    python benchmarks/kv_gpu.py --out benchmarks/results/kv_gpu.jsonl

Every cache reads the same prompt and generates the same number of tokens, in turns with the others: prefill latency,
decoding latency per token (100 tokens by default, so that a streaming gap is compressed once) and peak memory, weights
included. A shape that does not fit is shown as out of memory. On a CPU, `--device cpu` with small `--layers`,
`--hidden`, `--lengths` and `--batches` runs the same code without a statement about speed.

The paper's figures (input of 4,096 tokens, A100) are ZipCache *relative to MiKV*, an adaptive method that materializes
whole attention matrices. "MiKV-like" does that here: eager attention in prefill, from which accumulated attention
chooses the tokens; it decodes with the same kernel as ZipCache, which MiKV does not.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from tersor.bench.measure import Estimate, PairedTimes, machine, storage_bytes, time_paired, versions
from tersor.bench.records import Record, write_jsonl
from tersor.kv.bench.peers.builtin import quanto_cache
from tersor.kv.engine.call import AttentionCall
from tersor.kv.method import KVMethod
from tersor.kv.selection.ratio import SaliencySelection
from tersor.kv.storage.mixed import MixedPrecisionStorage
from tersor.kv.zipcache import ZipCache

FULL, OURS, MIKV = "DynamicCache, SDPA", "ZipCache 4/2 r=0.6", "MiKV-like 4/2 r=0.6"
#: Published change of ZipCache relative to MiKV, in percent.
CLAIMS = {"prefill": -37.3, "decode": -56.9, "peak memory": -19.8}
CLAIM_TOKENS = 4096
CLAIM_SOURCE = "latency and memory on LLaMA3-8B, input 4096, relative to MiKV"


@dataclass(frozen=True)
class AccumulatingPrefill:
    """Attention with its whole matrix in memory, whose column sums are the tokens' scores."""

    sparse = protect_text = False

    def operations(self, share: Any) -> Any:
        """Every token takes part."""
        return 1.0

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        output, weights = replace(call, options=call.options | {"output_attentions": True}).dense()
        layer = call.layer
        sums = weights.sum(2, dtype=torch.float32).mean(1, keepdim=True)
        layer.buffer.scores.add_sums(sums, torch.ones_like(sums[:, 0]))
        return output, None


@dataclass(frozen=True, kw_only=True)
class AccumulatedSelection(SaliencySelection):
    """Ranks by the scores that `AccumulatingPrefill` left; probes nothing of a prompt itself."""

    def probe_rows(self, length: int, *, layer: int, segment: int) -> Tensor:
        return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Method:
    """One cache to measure; ``engine`` is the method that the model runs with, None for the library's attention."""

    name: str
    build: Callable[[PreTrainedConfig], Cache]
    engine: KVMethod | None = None


def methods() -> list[Method]:
    """The caches that are compared, the uncompressed one first."""
    zipcache = ZipCache(saliency_ratio=0.6).method()
    mikv = KVMethod(
        name="mikv-like",
        selection=AccumulatedSelection(ratio=0.6, normalization="none"),
        storage=MixedPrecisionStorage(),
        prefill=AccumulatingPrefill(),
    )
    return [
        Method(FULL, lambda config: DynamicCache(config=config)),
        Method(OURS, zipcache.cache, zipcache),
        Method("QuantizedCache quanto 4-bit", lambda config: quanto_cache(config, bits=4, group_size=64)),
        Method(MIKV, mikv.cache, mikv),
    ]


@dataclass
class Measured:
    """What one method took at one shape: seconds per round, bytes; ``failure`` says why there is nothing."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    cache_bytes: int = 0
    peak_bytes: int | None = None
    failure: str | None = None


def llama(layers: int, hidden: int, device: str) -> LlamaForCausalLM:
    """Llama-3-8B for 32 layers of width 4096; other widths keep its proportions."""
    heads = max(4, hidden // 128)
    config = LlamaConfig(
        vocab_size=128256, hidden_size=hidden, intermediate_size=7 * hidden // 2, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4, head_dim=hidden // heads,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, max_position_embeddings=131072,
    )  # fmt: skip
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


@torch.inference_mode()
def run_once(
    model: LlamaForCausalLM, method: Method, ids: Tensor, steps: int, synchronize: Callable[[], None]
) -> tuple[float, float, Cache]:
    """Prefill ``ids`` and decode ``steps`` tokens: seconds of the prompt, seconds per token, the filled cache."""
    session = nullcontext() if method.engine is None else method.engine.on(model)
    with session:
        cache = method.build(model.config)
        synchronize()
        start = time.perf_counter()
        token = model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        synchronize()
        prefilled = time.perf_counter()
        for _ in range(steps):
            token = model(token, past_key_values=cache).logits.argmax(-1)
        synchronize()
        return prefilled - start, (time.perf_counter() - prefilled) / steps, cache


def measure_shape(
    model: LlamaForCausalLM, tokens: int, batch: int, *, steps: int, repeats: int, seed: int
) -> dict[str, Measured]:
    """All methods on one prompt shape; the first run of each finds out whether it fits and how much it takes."""
    on_gpu = model.device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)
    results = {method.name: Measured() for method in methods()}
    turns: dict[str, Callable[[], None]] = {}
    for method in methods():
        result = results[method.name]

        def turn(method: Method = method, result: Measured = result) -> None:
            prefill, decode, _ = run_once(model, method, ids, steps, synchronize)
            result.prefill.append(prefill)
            result.decode.append(decode)

        _free(on_gpu)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            cache = run_once(model, method, ids, steps, synchronize)[2]
        except torch.OutOfMemoryError:
            result.failure = "out of memory"
        except ImportError as error:
            result.failure = str(error)
        else:
            result.cache_bytes = storage_bytes(_stores(cache))
            result.peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else None
            del cache
            turns[method.name] = turn
    _free(on_gpu)
    if turns:
        time_paired(turns, repeats=repeats, warmup=0, seed=seed)
    return results


def _stores(cache: Cache) -> list[object]:
    """What a cache holds tokens in, without the model configuration that its layers may refer to."""
    return [layer.owned() if hasattr(layer, "owned") else layer for layer in cache.layers]


def _free(on_gpu: bool) -> None:
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


def paired(results: dict[str, Measured], part: str) -> PairedTimes:
    """Seconds of ``part`` ("prefill" or "decode"), by method and round."""
    return PairedTimes({name: tuple(getattr(each, part)) for name, each in results.items() if each.failure is None})


def change(results: dict[str, Measured], quantity: str) -> Estimate | None:
    """Change of ZipCache relative to the MiKV-like method in percent, None where either is missing."""
    ours, mikv = results[OURS], results[MIKV]
    if ours.failure or mikv.failure:
        return None
    if quantity == "peak memory":
        if ours.peak_bytes is None or mikv.peak_bytes is None:
            return None
        value = 100 * (ours.peak_bytes / mikv.peak_bytes - 1)
        return Estimate(value, value, value, "one run")
    ratio = paired(results, quantity).ratio(OURS, MIKV)
    return Estimate(100 * (ratio.value - 1), 100 * (ratio.low - 1), 100 * (ratio.high - 1), ratio.interval)


def shape_records(results: dict[str, Measured], tokens: int, batch: int, shared: dict[str, Any]) -> list[Record]:
    """Latency and bytes of every method, then ZipCache against the MiKV-like one beside the paper's claim."""
    rows: list[dict[str, Any]] = []
    for part in ("prefill", "decode"):
        times = paired(results, part)
        baseline = 1000 * times.seconds(FULL).value if FULL in times.samples else None
        for name in times.samples:
            each = times.seconds(name)
            unit = "ms" if part == "prefill" else "ms per token"
            rows.append(
                {"method": name, "quantity": f"{part} latency", "unit": unit, "measured": 1000 * each.value,
                 "low": 1000 * each.low, "high": 1000 * each.high, "interval": each.interval, "baseline": baseline}
            )  # fmt: skip
    for quantity in ("cache_bytes", "peak_bytes"):
        for name, each in results.items():
            held, full = getattr(each, quantity), getattr(results[FULL], quantity)
            if each.failure is None and held is not None:
                baseline = None if results[FULL].failure else float(full)
                rows.append(
                    {"method": name, "quantity": quantity.replace("_bytes", " memory"), "unit": "bytes",
                     "measured": float(held), "low": None, "high": None, "interval": None, "baseline": baseline}
                )  # fmt: skip
    on_claim = tokens == CLAIM_TOKENS and results[MIKV].peak_bytes is not None  # on a GPU, that is
    for quantity, published in CLAIMS.items():
        if (each := change(results, quantity)) is not None:
            rows.append(
                {"method": f"{OURS} against {MIKV}", "quantity": f"{quantity}, change", "unit": "%",
                 "measured": each.value, "low": None, "high": None, "interval": None, "baseline": None}
            )  # fmt: skip
            if quantity != "peak memory":  # which is the same in every round
                rows[-1] |= {"low": each.low, "high": each.high, "interval": each.interval}
            if on_claim:
                rows[-1] |= {"claim": published, "claim_source": CLAIM_SOURCE, "verdict": verdict(each, published)}
    plain = {"claim": None, "claim_source": None, "verdict": None, "peer": None, "peer_name": None}
    return [
        Record(**(plain | shared | {"item": f"{row.pop('method')}: {tokens} tokens, batch {batch}"} | row))
        for row in rows
    ]


def verdict(measured: Estimate, claim: float) -> str:
    """Whether the saving is as large as the paper's, there at all, or neither."""
    if measured.value <= claim:
        return "holds"
    return "partly" if measured.high < 0 else "fails"


def print_table(shapes: dict[tuple[int, int], dict[str, Measured]]) -> None:
    """One row a method and shape; ZipCache's cells say what it changes relative to the MiKV-like method."""
    table = Table("tokens", "batch", "cache", box=box.SIMPLE_HEAD, title="medians; % is relative to MiKV-like")
    for title in ("prefill, ms", "decode, ms a token", "cache, MiB", "peak memory, MiB"):
        table.add_column(title, justify="right")
    for (tokens, batch), results in shapes.items():
        for name, each in results.items():
            if each.failure is not None:
                table.add_row(f"{tokens:,}", str(batch), name, each.failure)
                continue
            cells = [f"{1000 * paired(results, part).seconds(name).value:,.1f}" for part in ("prefill", "decode")]
            peak = "" if each.peak_bytes is None else f"{each.peak_bytes / 2**20:,.0f}"
            cells += [f"{each.cache_bytes / 2**20:,.1f}", peak]
            if name == OURS:
                for place, quantity in ((0, "prefill"), (1, "decode"), (3, "peak memory")):
                    if (changed := change(results, quantity)) is not None:
                        cells[place] += f" ({changed.value:+.1f} %)"
            table.add_row(f"{tokens:,}", str(batch), name, *cells)
    claims = [f"{CLAIMS[quantity]:+.1f} %" for quantity in ("prefill", "decode", "peak memory")]
    table.add_row(f"{CLAIM_TOKENS:,}", "", "paper, A100: ZipCache against MiKV", *claims[:2], "", claims[2])
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Run the benchmark for command-line ``arguments`` and return its records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=100, help="tokens to decode in a round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write records here after every shape")
    options = parser.parse_args(arguments)
    if min(options.steps, options.repeats, *options.lengths, *options.batches) < 1:
        parser.error("--steps, --repeats, --lengths and --batches must be at least 1")
    model = llama(options.layers, options.hidden, options.device)
    shared = {
        "system": "kv", "n": options.repeats, "seed": options.seed, "model": "Llama class",
        "shapes": f"random; {options.layers} layers, hidden {options.hidden}", "versions": versions(),
        "machine": machine(), "command": shlex.join(["python", "benchmarks/kv_gpu.py", *(arguments or sys.argv[1:])]),
    }  # fmt: skip
    shapes, records = {}, []
    for tokens in options.lengths:
        for batch in options.batches:
            results = measure_shape(
                model, tokens, batch, steps=options.steps, repeats=options.repeats, seed=options.seed
            )
            shapes[tokens, batch] = results
            records += shape_records(results, tokens, batch, shared)
            if options.out is not None:
                write_jsonl(options.out, records)
    print_table(shapes)
    return records


if __name__ == "__main__":
    main()

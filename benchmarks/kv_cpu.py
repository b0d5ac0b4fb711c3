"""Speed and memory of packed decoding on this CPU, paired in one run.

    python benchmarks/kv_cpu.py --out benchmarks/results/kv_cpu.jsonl

1. Decode attention of one layer (8 KV heads, groups of 4, head dimension 128): one query against ZipCache 60/40 at
   4/2 bits, SDPA in float32 and bfloat16, and transformers' `QuantizedCache`, by context length.
2. One decoding step of a whole model of Llama-3.2-1B's shape with random weights in bfloat16: full bfloat16 cache
   against ZipCache, tokens a second and bytes of the cache.

Records go to ``--out`` as JSON lines, a table to the terminal.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.cache_utils import DynamicCache, QuantoQuantizedLayer
from turns import command_of, show_records

from tersor._compat import with_cache
from tersor.bench.measure import PairedTimes, machine, storage_bytes, time_paired
from tersor.bench.records import Record, write_jsonl
from tersor.bench.runs import record_maker
from tersor.kv.engine.call import AttentionCall
from tersor.kv.engine.layer import CompressedLayer
from tersor.kv.zipcache import ZipCache
from tersor.lowbit.kernels import chosen_backend

KV_HEADS, GROUP, DIM = 8, 4, 128
RECIPE = ZipCache(saliency_ratio=0.6, high_bits=4, low_bits=2)
#: What a layer reads of a model's attention module.
MODULE: Any = SimpleNamespace(config=LlamaConfig())
OURS = "ZipCache 4/2 r=0.6"


@dataclass(frozen=True)
class Shape:
    """The whole model: sizes of Llama-3.2-1B unless the command line shrinks them."""

    layers: int
    hidden: int
    context: int


def filled_layer(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[CompressedLayer, Any, Any]:
    """A compressed layer holding random tokens, and the same keys and values as they were."""
    keys, values = (torch.randn(1, KV_HEADS, tokens, DIM, generator=generator).to(dtype) for _ in range(2))
    layer = CompressedLayer(RECIPE.method(), 0)
    compress(layer, torch.randn(1, KV_HEADS * GROUP, tokens, DIM, generator=generator).to(dtype), keys, values)
    return layer, keys, values


def compress(layer: CompressedLayer, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Hand a prompt to a layer as a model's prefill does, attention output left out."""
    layer.update(keys, values)
    layer.observe(AttentionCall(MODULE, query, layer.keys, layer.values, None, keys.shape[-1] ** -0.5))


def attention_functions(tokens: int, generator: torch.Generator) -> dict[str, Callable[[], object]]:
    """One decode step by every alternative, over the same ``tokens``."""
    layer, keys, values = filled_layer(tokens, torch.float32, generator)
    query = torch.randn(1, KV_HEADS * GROUP, 1, DIM, generator=generator)
    half = [x.bfloat16() for x in (query, keys, values)]
    new = torch.randn(1, KV_HEADS, 1, DIM, generator=generator)
    layer.update(new, new)  # one raw token, so that the window is read as well
    call = AttentionCall(MODULE, query, layer.keys, layer.values, None, DIM**-0.5)
    quantized = QuantoQuantizedLayer(nbits=4, q_group_size=64, residual_length=128)
    quantized.update(keys, values)

    def builtin() -> torch.Tensor:
        k, v = quantized.update(new, new)
        return F.scaled_dot_product_attention(query, k, v, enable_gqa=True)

    return {
        OURS: lambda: layer.attend(call),
        "SDPA float32": lambda: F.scaled_dot_product_attention(query, keys, values, enable_gqa=True),
        "SDPA bfloat16": lambda: F.scaled_dot_product_attention(*half, enable_gqa=True),
        "QuantizedCache quanto 4-bit": builtin,
    }


def faster_sdpa(times: PairedTimes) -> str:
    """The precision in which SDPA is faster here."""
    return min(("SDPA float32", "SDPA bfloat16"), key=lambda name: times.seconds(name).value)


def attention_records(lengths: list[int], repeats: int, seed: int, record: Callable[..., Record]) -> list[Record]:
    """Milliseconds of every alternative, and our speed-up over the faster SDPA and over the built-in cache."""
    records = []
    for tokens in lengths:
        functions = attention_functions(tokens, torch.Generator().manual_seed(seed))
        times = time_paired(functions, repeats=repeats, warmup=3, seed=seed)
        shape = f"decode attention, {tokens:,} tokens, {KV_HEADS} KV heads, group {GROUP}, dimension {DIM}"
        for name in functions:
            records.append(record(f"{shape}: {name}", "time", "ms", times.seconds(name) * 1e3, repeats))
        for rival in (faster_sdpa(times), "QuantizedCache quanto 4-bit"):
            ratio = times.ratio(rival, OURS)
            records.append(record(f"{shape}: {OURS}", f"speed-up over {rival}", "x", ratio, repeats))
        del functions
        gc.collect()
    return records


def whole_model_records(shape: Shape, repeats: int, seed: int, record: Callable[..., Record]) -> list[Record]:
    """Tokens a second and bytes of a full and a compressed cache in the same model."""
    generator = torch.Generator().manual_seed(seed)
    heads = shape.hidden // 64
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=shape.hidden, intermediate_size=4 * shape.hidden, head_dim=64,
        num_hidden_layers=shape.layers, num_attention_heads=heads, num_key_value_heads=heads // 4,
        max_position_embeddings=131_072, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    full, ours = DynamicCache(config=config), RECIPE.cache(config)
    for index in range(shape.layers):
        size = (1, heads // 4, shape.context, 64)
        keys, values = (torch.randn(size, generator=generator).bfloat16() for _ in range(2))
        full.update(keys, values, index)
        compress(
            ours.layers[index], torch.randn(1, heads, shape.context, 64, generator=generator).bfloat16(), keys, values
        )
    full_bytes = storage_bytes([[layer.keys, layer.values] for layer in full.layers])
    token = torch.tensor([[17]])

    def step(cache: Any) -> None:
        model(token, **with_cache(cache))
        cache.crop(-1)

    def step_ours() -> None:
        with RECIPE.on(model):
            step(ours)

    with torch.inference_mode():
        times = time_paired({"full": lambda: step(full), OURS: step_ours}, repeats=repeats, warmup=2, seed=seed)
    speedup = times.ratio("full", OURS)
    name = f"whole model, {shape.layers} layers, hidden {shape.hidden}, {shape.context:,} tokens of context"
    return [
        *(
            record(f"{name}: {label}", "tokens a second", "1/s", times.seconds(key).rate(), repeats)
            for label, key in (("full bfloat16 cache", "full"), (OURS, OURS))
        ),
        record(f"{name}: {OURS}", "speed-up over the full bfloat16 cache", "x", speedup, repeats),
        record(f"{name}: {OURS}", "cache bytes", "x smaller", full_bytes / ours.memory_footprint(), 1),
    ]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; leaves with code 2 on sizes that make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--context", type=int, default=16384, help="of the whole model")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON lines of records")
    args = parser.parse_args(argv)
    if min(*args.lengths, args.context) < 64 or args.layers < 1 or args.hidden % 256 or args.repeats < 2:
        parser.error("lengths and context need at least 64 tokens, --hidden a multiple of 256, --repeats at least 2")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    record = record_maker(
        "kv speed", seed=args.seed, model="Llama shapes", shapes="random", command=command_of("kv_cpu", argv),
        machine=machine() | {"kernel": chosen_backend("packed_attention")},
    )  # fmt: skip
    records = attention_records(args.lengths, args.repeats, args.seed, record)
    shape = Shape(args.layers, args.hidden, args.context)
    records += whole_model_records(shape, max(2, args.repeats // 3), args.seed, record)
    show_records(records)
    if args.out:
        write_jsonl(args.out, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())

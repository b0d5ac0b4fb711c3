"""Prefill, decoding and memory of sparse prefills on a model of Qwen2.5-VL-7B's shape with random weights.

    python benchmarks/zipvl_gpu.py --out benchmarks/results/zipvl_gpu.jsonl

The decoder reads prompts of 32k and 128k tokens densely and at given shares of tokens in attention, in turns. Random
weights attend almost evenly, so a share is set instead of being found from ``tau``; probing, choosing, gathering and
eviction are ZipVL's own. 0.421 is the share that the paper reports for LongVA-7B on 128 frames. On a CPU, ``--device
cpu`` with small ``--layers``, ``--hidden`` and ``--lengths`` runs the same code without a statement about speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from turns import Alternative, Measured, cells_of, command_line, command_of, latency_records, measure_shape, paired

from tersor.bench.records import Record, write_jsonl
from tersor.bench.runs import record_maker, show
from tersor.kv.bench.peers.sparse import fixed_share

DENSE = "dense, SDPA"
CLAIM, CLAIM_SOURCE, CLAIM_SHARE, CLAIM_TOKENS = 2.6, "prefill speed-up, arXiv 2410.08584 v1, LongVA-7B", 0.421, 32768


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


def name_of(share: float) -> str:
    """A sparse prefill in reports."""
    return f"sparse prefill, {share:.1%} of tokens"


def length_records(results: dict[str, Measured], tokens: int, record: Callable[..., Record], n: int) -> list[Record]:
    """Latency and bytes of every prefill, and each one's speed-up over the dense one."""
    where = f"{tokens} tokens"
    records = latency_records(results, DENSE, where, record, n)
    for part in ("prefill", "decode"):
        times = paired(results, part)
        for name in times.samples:
            if name == DENSE or DENSE not in times.samples:
                continue
            ratio, claim = times.ratio(DENSE, name), {}
            on_gpu = results[name].peak_bytes is not None
            if part == "prefill" and on_gpu and tokens == CLAIM_TOKENS and name == name_of(CLAIM_SHARE):
                verdict = "holds" if ratio.value >= CLAIM else "partly" if ratio.low > 1 else "fails"
                claim = {"claim": CLAIM, "claim_source": CLAIM_SOURCE, "verdict": verdict}
            records.append(record(f"{name}: {where}", f"{part} speed-up", "x", ratio, n, baseline=1.0, **claim))
    return records


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Run the benchmark for command-line ``arguments`` and return its records."""
    parser = command_line(__doc__, layers=28, hidden=3584, lengths=[32768, 131072], steps=64)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.795, 0.528, CLAIM_SHARE])
    options = parser.parse_args(arguments)
    if min(options.steps, options.repeats, *options.lengths) < 1 or not all(0 < share < 1 for share in options.shares):
        parser.error("--steps, --repeats and --lengths must be at least 1, --shares between 0 and 1")
    model = decoder(options.layers, options.hidden, options.device)
    record = record_maker(
        "zipvl", seed=options.seed, model="Qwen2.5-VL-7B decoder shape", command=command_of("zipvl_gpu", arguments),
        shapes=f"random; {options.layers} layers, hidden {options.hidden}",
    )  # fmt: skip
    alternatives = [Alternative(DENSE)]
    for share in options.shares:
        method = fixed_share(share)
        alternatives.append(Alternative(name_of(share), method.cache, method))
    rows, records = [], []
    for tokens in options.lengths:
        results = measure_shape(model, alternatives, (1, tokens), options)
        rows += [[f"{tokens:,}", name, *cells_of(results, name)] for name in results]
        records += length_records(results, tokens, record, options.repeats)
        if options.out is not None:
            write_jsonl(options.out, records)
    columns = ("tokens", "attention", "prefill, ms", "decode, ms a token", "cache, MiB", "peak memory, MiB")
    show(columns, rows, names=2)
    return records


if __name__ == "__main__":
    main()

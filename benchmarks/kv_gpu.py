"""Latency and memory of KV caches on a Llama-3-8B-shaped model with random weights.

    python benchmarks/kv_gpu.py --out kv_gpu.jsonl

Every cache reads the same prompt and generates the same number of tokens, in turns with the others: prefill latency,
decoding latency per token (100 tokens by default, so that a streaming gap is compressed once) and peak memory, weights
included. A shape that does not fit is shown as out of memory. On a CPU, `--device cpu` with small `--layers`,
`--hidden`, `--lengths` and `--batches` runs the same code without a statement about speed.

The paper's figures (input of 4,096 tokens, A100) are ZipCache *relative to MiKV*, an adaptive method that materializes
whole attention matrices. "MiKV-like" does that here: eager attention in prefill, from which accumulated attention
chooses the tokens; it decodes with the same kernel as ZipCache, which MiKV does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from turns import Alternative, Measured, cells_of, command_line, command_of, latency_records, measure_shape, paired

from tersor.bench.measure import Estimate
from tersor.bench.records import Record, write_jsonl
from tersor.bench.runs import record_maker, show
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


def alternatives() -> list[Alternative]:
    """The caches that are compared, the uncompressed one first."""
    zipcache = ZipCache(saliency_ratio=0.6).method()
    mikv = KVMethod(
        name="mikv-like",
        selection=AccumulatedSelection(ratio=0.6, normalization="none"),
        storage=MixedPrecisionStorage(),
        prefill=AccumulatingPrefill(),
    )
    return [
        Alternative(FULL),
        Alternative(OURS, zipcache.cache, zipcache),
        Alternative("QuantizedCache quanto 4-bit", lambda config: quanto_cache(config, bits=4, group_size=64)),
        Alternative(MIKV, mikv.cache, mikv),
    ]


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


def shape_records(
    results: dict[str, Measured], tokens: int, batch: int, record: Callable[..., Record], n: int
) -> list[Record]:
    """Latency and bytes of every cache, then ZipCache against the MiKV-like one beside the paper's claim."""
    where = f"{tokens} tokens, batch {batch}"
    records = latency_records(results, FULL, where, record, n)
    on_claim = tokens == CLAIM_TOKENS and results[MIKV].peak_bytes is not None  # on a GPU, that is
    for quantity, published in CLAIMS.items():
        if (each := change(results, quantity)) is not None:
            claim = {"claim": published, "claim_source": CLAIM_SOURCE, "verdict": verdict(each, published)}
            # Peak memory is the same in every round.
            value = each.value if quantity == "peak memory" else each
            item, label = f"{OURS} against {MIKV}: {where}", f"{quantity}, change"
            records.append(record(item, label, "%", value, n, **(claim if on_claim else {})))
    return records


def verdict(measured: Estimate, claim: float) -> str:
    """Whether the saving is as large as the paper's, there at all, or neither."""
    if measured.value <= claim:
        return "holds"
    return "partly" if measured.high < 0 else "fails"


def print_table(shapes: dict[tuple[int, int], dict[str, Measured]]) -> None:
    """One row a cache and shape; ZipCache's cells say what it changes relative to the MiKV-like method."""
    rows = []
    for (tokens, batch), results in shapes.items():
        for name in results:
            cells = cells_of(results, name)
            if name == OURS:
                for place, quantity in ((0, "prefill"), (1, "decode"), (3, "peak memory")):
                    if (changed := change(results, quantity)) is not None:
                        cells[place] += f" ({changed.value:+.1f} %)"
            rows.append([f"{tokens:,}", str(batch), name, *cells])
    claims = [f"{CLAIMS[quantity]:+.1f} %" for quantity in ("prefill", "decode", "peak memory")]
    rows.append([f"{CLAIM_TOKENS:,}", "", "paper, A100: ZipCache against MiKV", *claims[:2], "", claims[2]])
    columns = ("tokens", "batch", "cache", "prefill, ms", "decode, ms a token", "cache, MiB", "peak memory, MiB")
    show(columns, rows, names=3, title="medians; % is relative to MiKV-like")


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Run the benchmark for command-line ``arguments`` and return its records."""
    parser = command_line(__doc__, layers=32, hidden=4096, lengths=[4096, 32768], steps=100)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    options = parser.parse_args(arguments)
    if min(options.steps, options.repeats, *options.lengths, *options.batches) < 1:
        parser.error("--steps, --repeats, --lengths and --batches must be at least 1")
    model = llama(options.layers, options.hidden, options.device)
    record = record_maker(
        "kv", seed=options.seed, model="Llama class", command=command_of("kv_gpu", arguments),
        shapes=f"random; {options.layers} layers, hidden {options.hidden}",
    )  # fmt: skip
    shapes, records = {}, []
    for tokens in options.lengths:
        for batch in options.batches:
            shapes[tokens, batch] = measure_shape(model, alternatives(), (batch, tokens), options)
            records += shape_records(shapes[tokens, batch], tokens, batch, record, options.repeats)
            if options.out is not None:
                write_jsonl(options.out, records)
    print_table(shapes)
    return records


if __name__ == "__main__":
    main()

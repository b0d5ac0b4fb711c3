"""Prefill attention of one layer of Qwen2.5-VL-7B's shape on this CPU: dense SDPA against ZipVL, in turns.

    python benchmarks/zipvl_cpu.py --out benchmarks/results/zipvl_cpu.jsonl

28 heads, 4 KV heads, head dimension 128, in float32 and bfloat16. Queries and keys are made so that about ``--ratio``
of the tokens hold 97.5 % of the attention; what is realised is measured and recorded. ZipVL's time has everything in
it: probe rows, choice of tokens, gathering, attention among them, scattering back. The baseline is the faster of the
two dense runs.

Records go to ``--out`` as JSON lines, a table to the terminal.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from turns import command_of, show_records

from tersor.bench.measure import PairedTimes, time_paired
from tersor.bench.records import Record, write_jsonl
from tersor.bench.runs import record_maker
from tersor.kv.engine.call import AttentionCall
from tersor.kv.engine.state import ForwardState
from tersor.kv.prefill.sparse import SparsePrefill
from tersor.kv.zipvl import ZipVL

HEADS, KV_HEADS, DIM = 28, 4, 128
TAU = 0.975
#: Spread of a head's own preference for a token, in units of the score.
OWN_SPREAD = 1.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLAIM, CLAIM_SOURCE, CLAIM_TOKENS = 2.6, "prefill speed-up, arXiv 2410.08584 v1, abstract", 8192

Tensors = tuple[Tensor, Tensor, Tensor]


def peaked(tokens: int, lift: float, seed: int) -> Tensors:
    """Queries, keys and values whose scores are ``lift`` higher for four tokens in ten, plus normal noise.

    With a direction ``u``, ``q = sqrt(D) u + g`` and ``k = m u + h`` give scores ``q . k / sqrt(D)`` of ``m`` plus what
    the token (``u . h``) and the pair of token and query (``g . h / sqrt(D)``) add of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(DIM, generator=generator), dim=0)
    lifted = (torch.rand(tokens, generator=generator) < 0.4).float() * lift
    query = OWN_SPREAD * torch.randn(1, HEADS, tokens, DIM, generator=generator) + DIM**0.5 * direction
    key = torch.randn(1, KV_HEADS, tokens, DIM, generator=generator) + lifted[:, None] * direction
    return query, key, torch.randn(1, KV_HEADS, tokens, DIM, generator=generator)


def layer_module() -> Any:
    """What attention functions read of a model's attention module."""
    config = SimpleNamespace(_attn_implementation="tersor")
    groups = HEADS // KV_HEADS
    return SimpleNamespace(config=config, num_key_value_groups=groups, is_causal=True, layer_idx=0, training=False)


def sparse(tensors: Tensors, prefill: SparsePrefill, state: ForwardState | None = None) -> Tensor:
    """The prompt's attention by ZipVL."""
    return prefill.attend(AttentionCall(layer_module(), *tensors, None, DIM**-0.5, state=state))[0]


def dense(tensors: Tensors) -> Tensor:
    """The prompt's attention as the library computes it."""
    return AttentionCall(layer_module(), *tensors, None, DIM**-0.5).dense()[0]


def realised_ratio(tensors: Tensors, recipe: ZipVL) -> float:
    """Share of the tokens that ZipVL keeps."""
    method = recipe.method()
    state = ForwardState(method, frozenset({0}))
    sparse(tensors, method.prefill, state)  # type: ignore[arg-type]
    return state.records[0].kept.index.shape[-1] / tensors[0].shape[2]


def calibrated(tokens: int, ratio: float, seed: int, recipe: ZipVL) -> tuple[Tensors, float]:
    """Tensors of which ZipVL keeps about ``ratio``, by bisection on the lift at a small size, and what it keeps."""
    low, high = 0.0, 12.0
    for _ in range(10):
        lift = (low + high) / 2
        kept = realised_ratio(peaked(min(tokens, 1024), lift, seed), recipe)
        low, high = (lift, high) if kept > ratio else (low, lift)
    tensors = peaked(tokens, (low + high) / 2, seed)
    return tensors, realised_ratio(tensors, recipe)


def length_records(tokens: int, options: argparse.Namespace, record: Callable[..., Record]) -> list[Record]:
    """Times of the four runs at one length, and ZipVL's speed-up over the faster dense one."""
    recipe = ZipVL(tau=TAU, min_tokens=0)
    tensors, ratio = calibrated(tokens, options.ratio, options.seed, recipe)
    prefill: Any = recipe.method().prefill
    functions: dict[str, Callable[[], object]] = {}
    for name, dtype in DTYPES.items():
        own = tuple(x.to(dtype) for x in tensors)
        functions[f"dense {name}"] = lambda own=own: dense(own)
        functions[f"ZipVL {name}"] = lambda own=own: sparse(own, prefill)
    repeats = max(3, min(options.repeats, options.repeats * 4096 // tokens))
    with torch.inference_mode():
        times = time_paired(functions, repeats=repeats, warmup=1, seed=options.seed)
    del functions
    gc.collect()
    shape = f"prefill attention, {tokens:,} tokens, {HEADS} heads, {KV_HEADS} KV heads, dimension {DIM}"
    records = [record(f"{shape}: {name}", "time", "ms", times.seconds(name) * 1e3, repeats) for name in times.samples]
    best = {kind: faster(times, kind) for kind in ("dense", "ZipVL")}
    speedup = times.ratio(best["dense"], best["ZipVL"])
    claim = {}
    if tokens == CLAIM_TOKENS:
        verdict = "holds" if speedup.value >= CLAIM else "partly" if speedup.low > 1 else "fails"
        claim = {"claim": CLAIM, "claim_source": CLAIM_SOURCE, "verdict": verdict}
    records.append(
        record(f"{shape}: {best['ZipVL']}", f"speed-up over {best['dense']}", "x", speedup, repeats, **claim)
    )
    for name in DTYPES:
        own = times.ratio(f"dense {name}", f"ZipVL {name}")
        records.append(record(f"{shape}: {name}", "speed-up in the same precision", "x", own, repeats))
    records.append(record(f"{shape}: ZipVL", "kept tokens", "share", ratio, 1))
    return records


def faster(times: PairedTimes, kind: str) -> str:
    """The precision in which ``kind`` runs faster here."""
    return min((f"{kind} {name}" for name in DTYPES), key=lambda name: times.seconds(name).value)


def main(arguments: list[str] | None = None) -> list[Record]:
    """Measure, print and write; returns the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--ratio", type=float, default=0.4, help="share of tokens that holds 97.5 %% of the mass")
    parser.add_argument("--repeats", type=int, default=9, help="rounds; long prompts take fewer, at least 3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON lines of records, written after every length")
    options = parser.parse_args(arguments)
    if min(options.lengths) < 64 or options.repeats < 3 or not 0 < options.ratio < 1:
        parser.error("--lengths need at least 64 tokens, --repeats at least 3, --ratio a share between 0 and 1")
    torch.set_num_threads(options.threads)
    record = record_maker(
        "zipvl speed", seed=options.seed, model="Qwen2.5-VL-7B attention shape", shapes="random",
        command=command_of("zipvl_cpu", arguments),
    )  # fmt: skip
    records: list[Record] = []
    for tokens in options.lengths:
        records += length_records(tokens, options, record)
        if options.out:
            write_jsonl(options.out, records)
    show_records(records)
    return records


if __name__ == "__main__":
    main()

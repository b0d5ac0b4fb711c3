"""The one measuring loop of the scripts that time caches on a whole model: prompt, tokens and memory, in turns."""

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
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from tersor._compat import with_cache
from tersor.bench.measure import PairedTimes, storage_bytes, time_paired
from tersor.bench.records import Record
from tersor.bench.runs import show
from tersor.kv.method import KVMethod


@dataclass(frozen=True)
class Alternative:
    """One cache to measure."""

    name: str
    build: Callable[[PreTrainedConfig], Cache] = field(default=lambda config: DynamicCache(config=config))
    engine: KVMethod | None = None
    """The method that the model runs with; None runs the library's attention."""


@dataclass
class Measured:
    """What one alternative took at one shape."""

    prefill: list[float] = field(default_factory=list)
    """Seconds of the prompt, by round."""
    decode: list[float] = field(default_factory=list)
    """Seconds a token, by round."""
    cache_bytes: int = 0
    peak_bytes: int | None = None
    """Weights included; None on a CPU."""
    failure: str | None = None
    """Why there is nothing."""


@torch.inference_mode()
def run_once(
    model: PreTrainedModel, alternative: Alternative, ids: Tensor, steps: int, synchronize: Callable[[], None]
) -> tuple[float, float, Cache]:
    """Prefill ``ids`` and decode ``steps`` tokens: seconds of the prompt, seconds a token, the filled cache."""
    with nullcontext() if alternative.engine is None else alternative.engine.on(model):
        cache = alternative.build(model.config)
        synchronize()
        start = time.perf_counter()
        token = model(ids, **with_cache(cache), logits_to_keep=1).logits.argmax(-1)
        synchronize()
        prefilled = time.perf_counter()
        for _ in range(steps):
            token = model(token, **with_cache(cache)).logits.argmax(-1)
        synchronize()
        return prefilled - start, (time.perf_counter() - prefilled) / steps, cache


def measure_shape(
    model: PreTrainedModel, alternatives: Sequence[Alternative], shape: tuple[int, int], options: argparse.Namespace
) -> dict[str, Measured]:
    """All alternatives on one random prompt; the first run of each finds out whether it fits and how much it takes.

    Args:
        model: On its device.
        alternatives: What takes turns.
        shape: Rows and tokens of the prompt.
        options: ``steps`` to decode, ``repeats`` and ``seed``, as `command_line` reads them.
    """
    on_gpu = model.device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(model.device)
    results = {each.name: Measured() for each in alternatives}
    turns: dict[str, Callable[[], None]] = {}
    for each in alternatives:
        result = results[each.name]

        def turn(each: Alternative = each, result: Measured = result) -> None:
            prefill, decode, _ = run_once(model, each, ids, options.steps, synchronize)
            result.prefill.append(prefill)
            result.decode.append(decode)

        _free(on_gpu)
        try:
            cache = run_once(model, each, ids, options.steps, synchronize)[2]
        except torch.OutOfMemoryError:
            result.failure = "out of memory"
        except ImportError as error:
            result.failure = str(error)
        else:
            # Without the model configuration that layers may refer to.
            stores = [layer.owned() if hasattr(layer, "owned") else layer for layer in cache.layers]
            result.cache_bytes = storage_bytes(stores)
            result.peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else None
            del cache, stores
            turns[each.name] = turn
    _free(on_gpu)
    if turns:
        time_paired(turns, repeats=options.repeats, warmup=0, seed=options.seed)
    return results


def _free(on_gpu: bool) -> None:
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def paired(results: dict[str, Measured], part: str) -> PairedTimes:
    """Seconds of ``part`` ("prefill" or "decode"), by alternative and round."""
    return PairedTimes({name: tuple(getattr(each, part)) for name, each in results.items() if each.failure is None})


def latency_records(
    results: dict[str, Measured], baseline: str, where: str, record: Callable[..., Record], n: int
) -> list[Record]:
    """Latencies and bytes of every alternative that fitted.

    Args:
        results: What `measure_shape` found.
        baseline: The alternative that the others are compared with.
        where: The shape in words, behind the alternative's name.
        record: A maker of records.
        n: Rounds.
    """
    records = []
    for part, unit in (("prefill", "ms"), ("decode", "ms per token")):
        times = paired(results, part)
        usual = (times.seconds(baseline) * 1e3).value if baseline in times.samples else None
        for name in times.samples:
            value = times.seconds(name) * 1e3
            records.append(record(f"{name}: {where}", f"{part} latency", unit, value, n, baseline=usual))
    for quantity in ("cache_bytes", "peak_bytes"):
        for name, each in results.items():
            held, full = getattr(each, quantity), getattr(results[baseline], quantity)
            if each.failure is None and held is not None:
                usual = None if results[baseline].failure else float(full)
                label = quantity.replace("_bytes", " memory")
                records.append(record(f"{name}: {where}", label, "bytes", float(held), n, baseline=usual))
    return records


def cells_of(results: dict[str, Measured], name: str) -> list[str]:
    """Median latencies in ms and memory in MiB of one alternative for a table, or why there are none."""
    each = results[name]
    if each.failure is not None:
        return [each.failure, "", "", ""]
    medians = (1e3 * paired(results, part).seconds(name).value for part in ("prefill", "decode"))
    peak = "" if each.peak_bytes is None else f"{each.peak_bytes / 2**20:,.0f}"
    return [*(f"{median:,.1f}" for median in medians), f"{each.cache_bytes / 2**20:,.1f}", peak]


def command_line(
    doc: str | None, *, layers: int, hidden: int, lengths: Sequence[int], steps: int
) -> argparse.ArgumentParser:
    """The arguments that the scripts for GPUs share, to add others to; the values are defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--hidden", type=int, default=hidden)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(lengths))
    parser.add_argument("--steps", type=int, default=steps, help="tokens to decode in a round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write records here after every shape")
    return parser


def command_of(script: str, arguments: Sequence[str] | None) -> str:
    """The command that reproduces the records of a script."""
    return shlex.join(["python", f"benchmarks/{script}.py", *(sys.argv[1:] if arguments is None else arguments)])


def show_records(records: Sequence[Record]) -> None:
    """The records as a table in the terminal."""

    def row(each: Record) -> tuple[Any, ...]:
        spread = "" if each.low is None else f"{each.low:.3g} .. {each.high:.3g}"
        return each.item, each.quantity, f"{each.measured:.3g} {each.unit}", spread

    show(("what", "quantity", "measured", "spread"), map(row, records), names=4)

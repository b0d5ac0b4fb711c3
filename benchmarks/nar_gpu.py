"""Images a second of NAR against raster decoding and PAR-4X, published shapes with random weights.

    python benchmarks/nar_gpu.py --out benchmarks/results/nar_gpu.jsonl

Records are written after every batch size.

NAR has the published size named by ``--size`` (its backbone and one further block); raster is `LlamaGen` with the
same backbone, and PAR-4X (arXiv 2412.15119) too: four tokens one by one, then four a pass. All of them guide, which
doubles the batch, draw from the whole distribution, and take turns in one run. The paper's figures are of an A100 at
the largest batch that fits. With ``--device cpu`` and small ``--layers``, ``--hidden``, ``--grid`` and ``--batches``
the same code runs without a statement about speed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from turns import command_of

from tersor.bench.measure import time_paired
from tersor.bench.records import Record, write_jsonl
from tersor.bench.runs import record_maker, show
from tersor.grids.geometry import front_count
from tersor.grids.llamagen import LlamaGen, LlamaGenConfig
from tersor.grids.nar.baselines import PARConfig, PARForImageGeneration, par_groups
from tersor.grids.nar.heads import NARConfig, NARForImageGeneration

NAR, PAR, RASTER = "NAR", "PAR-4X", "raster"
#: The paper's images a second, of NAR, PAR-4X and LlamaGen with the same backbone (ImageNet, 256 pixels).
CLAIMS = {
    "B": {NAR: 419.7, PAR: 174.1, RASTER: 117.9},
    "L": {NAR: 195.4, PAR: 93.8, RASTER: 47.1},
    "XL": {NAR: 98.1, PAR: 53.9, RASTER: 23.7},
    "XXL": {NAR: 56.9, PAR: 33.9, RASTER: 14.1},
}
CLAIM_SOURCE = "ImageNet 256x256 by class, one A100-80GB, largest batch that fits"
GUIDANCE = 2.0
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def new_models(args: argparse.Namespace, grid: tuple[int, int]) -> dict[str, Any]:
    """NAR, and raster and PAR with the same backbone, random weights, by name."""
    changes = {} if args.layers is None else {"num_hidden_layers": args.layers}
    if args.hidden is not None:
        changes |= {"hidden_size": args.hidden, "num_attention_heads": 4}
    nar = NARConfig.preset(args.size, grid_size=grid, **changes)
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = {name: getattr(nar, name) for name in shared}
    raster, par = (kind(**sizes, grid_size=grid) for kind in (LlamaGenConfig, PARConfig))
    made: dict[str, Any] = {}
    for name, kind, config in (
        (NAR, NARForImageGeneration, nar), (PAR, PARForImageGeneration, par), (RASTER, LlamaGen, raster)
    ):  # fmt: skip
        with torch.device("meta"):
            model: Any = kind(config)
        model = model.to(DTYPES[args.dtype]).to_empty(device=args.device).eval()
        generator = torch.Generator(args.device).manual_seed(args.seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.uniform_(-0.02, 0.02, generator=generator)
        made[name] = model
    return made


def alternatives(models: dict[str, Any], batch: int, seed: int) -> dict[str, Callable[[], object]]:
    """What takes turns, by name."""
    device = models[NAR].device
    labels = torch.arange(batch, device=device) % models[NAR].config.num_classes

    def generator() -> torch.Generator:
        return torch.Generator(device).manual_seed(seed)

    return {
        NAR: lambda: models[NAR].generate(labels, guidance_scale=GUIDANCE, generator=generator()),
        PAR: lambda: models[PAR].generate(labels, guidance_scale=GUIDANCE, generator=generator()),
        RASTER: lambda: models[RASTER].generate(
            labels, guidance_scale=GUIDANCE, do_sample=True, top_k=0, generator=generator()
        ),
    }


def records_of(times: Any, batch: int, args: argparse.Namespace, grid: tuple[int, int], shapes: str) -> list[Record]:
    """Images a second of each way, then NAR's speed-up over both others."""
    record = record_maker("nar", seed=args.seed, model=f"NAR-{args.size} shape", shapes=shapes, command=args.command)
    cells = grid[0] * grid[1]
    passes = {NAR: front_count(grid), PAR: len(par_groups(*grid)), RASTER: cells}
    # The published figures are of the published shapes on a GPU.
    judged = args.layers is None and args.hidden is None and args.device.startswith("cuda") and grid == (16, 16)
    claims = CLAIMS.get(args.size, {}) if judged else {}
    source = CLAIM_SOURCE if claims else None
    found = []
    for name, count in passes.items():
        item, rate = f"{name}, {count} passes, batch {batch}", times.seconds(name).rate(batch)
        claim = {"claim": claims.get(name), "claim_source": source}
        found.append(record(item, "throughput", "images/s", rate, args.repeats, **claim))
    for name in (PAR, RASTER):
        claim = {"claim": claims[NAR] / claims[name] if claims else None, "claim_source": source}
        peer = {"peer": passes[name] / passes[NAR], "peer_name": "if time were passes"}
        item, ratio = f"NAR over {name}, batch {batch}", times.ratio(name, NAR)
        found.append(record(item, "speed-up", "x", ratio, args.repeats, baseline=1.0, **claim, **peer))
    return found


def main(argv: list[str] | None = None) -> list[Record]:
    """Measure, print and write; returns the records."""
    parser = argparse.ArgumentParser(description="NAR against raster and PAR-like decoding, random weights.")
    parser.add_argument("--size", choices=CLAIMS, default="B")
    parser.add_argument("--grid", default="16x16", help="rows x columns in tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--layers", type=int, help="of the backbone, instead of the published number")
    parser.add_argument("--hidden", type=int, help="width, instead of the published one; a multiple of 16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    rows, _, columns = args.grid.partition("x")
    sides = [int(each) if each.isdecimal() else 0 for each in (rows, columns)]
    if min(sides) < 2 or any(side % 2 for side in sides):
        parser.error(f"--grid {args.grid} must be rows x columns, even numbers of tokens such as 16x16")
    if min(*args.batches, args.repeats) < 1 or (args.hidden or 16) % 16 or (args.layers or 1) < 1:
        parser.error("--batches, --repeats and --layers must be at least 1, and --hidden a multiple of 16")
    grid = (sides[0], sides[1])
    args.command = command_of("nar_gpu", argv)
    models = new_models(args, grid)
    config = models[NAR].config
    shapes = (
        f"random weights: {config.num_hidden_layers} layers and one for the head below, width {config.hidden_size}, "
        f"{args.dtype}, {args.grid} tokens, guidance"
    )
    records: list[Record] = []
    for batch in args.batches:
        try:
            times = time_paired(alternatives(models, batch, args.seed), repeats=args.repeats, seed=args.seed)
        except torch.OutOfMemoryError:
            print(f"batch {batch}: out of memory")
            continue
        records += records_of(times, batch, args, grid, shapes)
        if args.out is not None:
            write_jsonl(args.out, records)
    rows = (
        (each.item, "" if each.claim is None else f"{each.claim:.3g}",
         f"{each.measured:.3g} {each.unit} [{each.low:.3g}, {each.high:.3g}]")
        for each in records
    )  # fmt: skip
    show(("what", "paper", "measured"), rows, names=3)
    return records


if __name__ == "__main__":
    main()
    sys.exit(0)

"""Images a second of NAR against raster decoding and a PAR-like schedule, published shapes with random weights.

    python benchmarks/nar_gpu.py --out benchmarks/results/nar_gpu.jsonl

NAR has the published size named by ``--size`` (its backbone and one further block); raster is `LlamaGen` with the
same backbone, and "PAR-4X-like" runs that same raster model as PAR-4X (arXiv 2412.15119) would: four tokens one by one,
then four a pass. It is there for the time of its passes, its images mean nothing. All of them guide, which doubles the
batch, draw from the whole distribution, and take turns in one run. The paper's figures are of an A100 at the largest
batch that fits. With ``--device cpu`` and small ``--layers``, ``--hidden``, ``--grid`` and ``--batches`` the same code
runs without a statement about speed.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from tersor.bench.measure import Estimate, machine, time_paired, versions
from tersor.bench.records import Record, write_jsonl
from tersor.grids.geometry import front_count
from tersor.grids.model import LlamaGen, LlamaGenConfig
from tersor.grids.nar import NARConfig, NARForImageGeneration

NAR, PAR, RASTER = "NAR", "PAR-4X-like", "raster"
#: The paper's images a second, of NAR, PAR-4X and LlamaGen with the same backbone (ImageNet, 256 pixels).
CLAIMS = {
    "B": {NAR: 419.7, PAR: 174.1, RASTER: 117.9},
    "L": {NAR: 195.4, PAR: 93.8, RASTER: 47.1},
    "XL": {NAR: 98.1, PAR: 53.9, RASTER: 23.7},
    "XXL": {NAR: 56.9, PAR: 33.9, RASTER: 14.1},
}
CLAIM_SOURCE = "ImageNet 256x256 by class, one A100-80GB, largest batch that fits"
GUIDANCE = 2.0
#: Tokens of a pass of PAR-4X, and of its sequential start.
WIDTH = 4
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def new_models(args: argparse.Namespace, grid: tuple[int, int]) -> tuple[NARForImageGeneration, LlamaGen]:
    """NAR and the raster model with the same backbone, random weights."""
    changes = {} if args.layers is None else {"num_hidden_layers": args.layers}
    if args.hidden is not None:
        changes |= {"hidden_size": args.hidden, "num_attention_heads": 4}
    nar = NARConfig.preset(args.size, grid_size=grid, **changes)
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    raster = LlamaGenConfig(**{name: getattr(nar, name) for name in shared}, grid_size=grid)
    made: list[Any] = []
    for kind, config in ((NARForImageGeneration, nar), (LlamaGen, raster)):
        with torch.device("meta"):
            model: Any = kind(config)
        model = model.to(DTYPES[args.dtype]).to_empty(device=args.device).eval()
        generator = torch.Generator(args.device).manual_seed(args.seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.uniform_(-0.02, 0.02, generator=generator)
        made.append(model)
    return made[0], made[1]


def par_passes(cells: int) -> int:
    """Passes of PAR-4X: its sequential start, then ``WIDTH`` tokens each."""
    return WIDTH + math.ceil((cells - WIDTH) / WIDTH)


@torch.inference_mode()
def par_like(model: LlamaGen, labels: Tensor, generator: torch.Generator) -> int:
    """The forwards of PAR-4X; returns how many there were."""
    rows, columns = model.config.grid_size
    embeddings, _ = model.condition(labels, guided=True)
    cache, batch, place = DynamicCache(), len(labels), 1
    passes = par_passes(rows * columns)
    for number in range(passes):
        width, seen = embeddings.shape[1], cache.get_seq_length()
        places = torch.arange(place - width, place, device=labels.device).expand(2 * batch, width)
        mask = torch.zeros(1, 1, width, seen + width, dtype=model.dtype, device=labels.device)
        logits = model(
            inputs_embeds=embeddings, position_ids=places, attention_mask=mask, past_key_values=cache
        ).logits.float()
        conditional, unconditional = logits.chunk(2)
        law = (unconditional + GUIDANCE * (conditional - unconditional)).softmax(-1)
        drawn = torch.multinomial(law.flatten(0, 1), 1, generator=generator).view(batch, width)
        # From the end of the start on, every pass feeds and yields a token of each part of the image.
        fed = drawn if number < WIDTH - 1 or width == WIDTH else drawn.expand(batch, WIDTH)
        place = min(place + fed.shape[1], rows * columns)
        embeddings = model.tok_embeddings(fed.repeat(2, 1))
    return passes


def alternatives(
    nar: NARForImageGeneration, raster: LlamaGen, batch: int, seed: int
) -> dict[str, Callable[[], object]]:
    """What takes turns, by name."""
    labels = torch.arange(batch, device=nar.device) % nar.config.num_classes

    def generator() -> torch.Generator:
        return torch.Generator(nar.device).manual_seed(seed)

    return {
        NAR: lambda: nar.generate(labels, guidance_scale=GUIDANCE, generator=generator()),
        PAR: lambda: par_like(raster, labels, generator()),
        RASTER: lambda: raster.generate(
            labels, guidance_scale=GUIDANCE, do_sample=True, top_k=0, generator=generator()
        ),
    }


def records_of(times: Any, batch: int, args: argparse.Namespace, grid: tuple[int, int], shapes: str) -> list[Record]:
    """Images a second of each way, then NAR's speed-up over both others."""
    shared: dict[str, Any] = {
        "system": "nar", "n": args.repeats, "seed": args.seed, "model": f"NAR-{args.size} shape", "shapes": shapes,
        "versions": versions(), "machine": machine(), "command": args.command, "verdict": None, "baseline": None,
        "peer": None, "peer_name": None,
    }  # fmt: skip
    cells = grid[0] * grid[1]
    passes = {NAR: front_count(grid), PAR: par_passes(cells), RASTER: cells}
    # The published figures are of the published shapes on a GPU.
    judged = args.layers is None and args.hidden is None and args.device.startswith("cuda") and grid == (16, 16)
    claims = CLAIMS.get(args.size, {}) if judged else {}
    found = []
    for name, count in passes.items():
        seconds = times.seconds(name)
        rate = Estimate(batch / seconds.value, batch / seconds.high, batch / seconds.low, seconds.interval)
        found.append(
            Record(
                item=f"{name}, {count} passes, batch {batch}", quantity="throughput", unit="images/s",
                claim=claims.get(name), claim_source=CLAIM_SOURCE if claims else None, measured=rate.value,
                low=rate.low, high=rate.high, interval=rate.interval, **shared,
            )
        )  # fmt: skip
    for name in (PAR, RASTER):
        ratio = times.ratio(name, NAR)
        fields = {**shared, "baseline": 1.0, "peer": passes[name] / passes[NAR], "peer_name": "if time were passes"}
        found.append(
            Record(
                item=f"NAR over {name}, batch {batch}", quantity="speed-up", unit="x",
                claim=claims[NAR] / claims[name] if claims else None, claim_source=CLAIM_SOURCE if claims else None,
                measured=ratio.value, low=ratio.low, high=ratio.high, interval=ratio.interval, **fields,
            )
        )  # fmt: skip
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
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) * int(columns) >= WIDTH):
        parser.error(f"--grid {args.grid} must be rows x columns with at least {WIDTH} tokens, such as 16x16")
    if min(*args.batches, args.repeats) < 1 or (args.hidden or 16) % 16 or (args.layers or 1) < 1:
        parser.error("--batches, --repeats and --layers must be at least 1, and --hidden a multiple of 16")
    grid = (int(rows), int(columns))
    args.command = shlex.join(["python", "benchmarks/nar_gpu.py", *(sys.argv[1:] if argv is None else argv)])
    nar, raster = new_models(args, grid)
    config = nar.config
    shapes = (
        f"random weights: {config.num_hidden_layers} layers and one for the head below, width {config.hidden_size}, "
        f"{args.dtype}, {args.grid} tokens, guidance"
    )
    console, records = Console(), []
    for batch in args.batches:
        try:
            times = time_paired(alternatives(nar, raster, batch, args.seed), repeats=args.repeats, seed=args.seed)
        except torch.OutOfMemoryError:
            console.print(f"batch {batch}: out of memory")
            continue
        records += records_of(times, batch, args, grid, shapes)
    table = Table("what", "paper", "measured")
    for record in records:
        claim = "" if record.claim is None else f"{record.claim:.3g}"
        table.add_row(record.item, claim, f"{record.measured:.3g} {record.unit} [{record.low:.3g}, {record.high:.3g}]")
    console.print(table)
    if args.out is not None:
        write_jsonl(args.out, records)
    return records


if __name__ == "__main__":
    main()
    sys.exit(0)

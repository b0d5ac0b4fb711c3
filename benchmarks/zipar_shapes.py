"""Time of an image by a model of Emu3-8B's shape with random weights: raster, ZipAR and speculative, in turns.

    python benchmarks/zipar_shapes.py --out benchmarks/results/zipar_shapes.jsonl
    python benchmarks/zipar_shapes.py --speculative 16 64 128 --out benchmarks/results/speculative_shapes.jsonl

The blocks are those of `Emu3ForCausalLM`: width 4096, 32 heads, 8 KV heads, feed-forward 14336, 184,622 tokens. Only
``--layers`` of the 32 are there, and only some passes of the image are run: those in the middle of equal parts of it,
with the feeds, mask and cache length that they have. Guidance doubles the batch. What is recorded for the whole image
and for 32 layers is extrapolated from these, and says so.

Random weights say nothing about how many drafts are kept. So with ``--speculative`` the time of a pass is measured, and
that of an image follows for each entry of `CELLS_PER_PASS`.

Records go to ``--out`` as JSON lines, a table to the terminal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, Emu3ForCausalLM, Emu3TextConfig
from turns import command_of, show_records

from tersor._compat import with_cache
from tersor.bench.measure import Estimate, PairedTimes, bootstrap_interval, time_paired
from tersor.bench.records import Record, write_jsonl
from tersor.bench.runs import record_maker
from tersor.grids.geometry import RasterGrid
from tersor.grids.raster.attention import with_grouped_attention
from tersor.grids.raster.slots import Run, Slots
from tersor.grids.schedule import Frontier, raster_passes, zipar_passes
from tersor.grids.speculative.schedule import Window

LAYERS = 32
PREFIX = 32
#: Conditional and unconditional.
ROWS = 2
#: Cells that a pass of speculative decoding decides, and where that was seen.
CELLS_PER_PASS = {
    "2.1 cells a pass (SJD, published)": 2.1,
    "4.2 cells a pass (MC-SJD, published)": 4.2,
    "7 cells a pass (tiny-raster)": 7.0,
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def new_model(layers: int, device: str, dtype: torch.dtype, *, hidden: int, vocabulary: int) -> Any:
    """Blocks and head with random weights; ids are never embedded, so the embedding is left small."""
    config = Emu3TextConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
        vocab_size=vocabulary,
        max_position_embeddings=9216,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        model = Emu3ForCausalLM(config)
        model.model.embed_tokens = torch.nn.Embedding(16, hidden)
    rotary = type(model.model.rotary_emb)(config)
    model = model.to(dtype).to_empty(device=device)
    model.model.rotary_emb = rotary.to(device)  # its buffers are computed, not loaded
    with torch.no_grad():
        for weight in model.parameters():
            weight.uniform_(-0.02, 0.02)
    return model.eval()


@dataclass(frozen=True)
class Point:
    """One pass of the image.

    Args:
        held: offsets of the tokens in the cache, in their order. fed: of those that the pass feeds, and ``keep``: which
            of them yield a cell.
    """

    held: tuple[int, ...]
    fed: tuple[int, ...]
    keep: tuple[int, ...]


def middles(passes: int, samples: int) -> list[int]:
    """The passes, from 0, in the middle of ``samples`` equal parts."""
    return [int((index + 0.5) * passes / samples) for index in range(samples)]


def raster_points(grid: RasterGrid, samples: int) -> list[Point]:
    """Pass p feeds the token before position p."""
    chosen = [max(1, each) for each in middles(raster_passes(grid), samples)]
    return [Point(tuple(range(each - 1)), (each - 1,), (0,)) for each in chosen]


def zipar_points(grid: RasterGrid, window: int, samples: int) -> list[Point]:
    """Passes as the schedule has them."""
    chosen = {max(1, each) for each in middles(zipar_passes(grid.rows, grid.columns, window, "eol"), samples)}
    frontier, held, points, number = Frontier(grid, window, "eol"), [], [], 0
    while (step := frontier.advance()) is not None:
        fed = [feed.offset for feed in step.feeds]
        if number in chosen:
            keep = tuple(index for index, feed in enumerate(step.feeds) if feed.yields is not None)
            points.append(Point(tuple(held), tuple(fed), keep))
        held += fed
        number += 1
    return points


def speculative_points(grid: RasterGrid, window: int, samples: int) -> list[Point]:
    """Passes of full windows, whose slots hold all tokens up to the last decided one."""
    points = []
    for cell in middles(grid.rows * grid.columns - window, samples):
        step = Window(grid, window, above=True).advance(max(1, cell))
        assert step is not None
        points.append(Point(tuple(range(step.fed[0])), step.fed, step.keep))
    return points


class Pass:
    """A pass that can be run again and again: it writes the same slots each time."""

    def __init__(self, model: Any, point: Point, seed: int) -> None:
        self.model, self.point = model, point
        config, weight = model.config, model.lm_head.weight
        generator = torch.Generator(weight.device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            drawn = torch.rand(*shape, generator=generator, device=weight.device) - 0.5
            return drawn.to(weight.dtype)

        self.cache = DynamicCache(config=config)
        valid = torch.ones(ROWS, PREFIX, dtype=torch.bool, device=weight.device)
        self.slots = Slots(self.cache, valid, len(point.held) + len(point.fed))
        self.fed = torch.tensor(point.fed, device=weight.device)
        if point.held:
            self.slots.feed(torch.tensor(point.held, device=weight.device), point.held, weight.dtype)
        self.slots.written = Run(0, self.slots.held)
        for layer in range(config.num_hidden_layers):
            shape = (ROWS, config.num_key_value_heads, self.slots.held, 128)
            self.cache.update(draw(*shape), draw(*shape), layer)
        self.embeddings = draw(ROWS, len(point.fed), config.hidden_size)
        self.kept = draw(ROWS, len(point.keep), config.hidden_size)

    @torch.inference_mode()
    def layers(self) -> None:
        """The blocks, and what the decoder does for their mask and positions."""
        # A token that is fed again takes the slot that it had.
        mask = self.slots.feed(self.fed, self.point.fed, self.embeddings.dtype)
        self.model.model(
            inputs_embeds=self.embeddings,
            position_ids=(PREFIX + self.fed).expand(ROWS, -1),
            attention_mask=mask,
            **with_cache(self.cache),
            use_cache=True,
        )

    @torch.inference_mode()
    def head(self) -> None:
        """Logits of the cells that the pass yields."""
        self.model.lm_head(self.kept)


def whole_image(times: PairedTimes, name: str, samples: int, passes: int, layers: int) -> np.ndarray:
    """Seconds of the whole image with 32 layers, by round: the mean of the sampled passes times their number."""
    parts = [
        np.asarray(times.samples[f"{name} {index} layers"]) * LAYERS / layers
        + np.asarray(times.samples[f"{name} {index} head"])
        for index in range(samples)
    ]
    return np.mean(parts, axis=0) * passes


def expected(
    seconds: dict[str, np.ndarray], grid: RasterGrid, windows: Sequence[int], record: Callable[..., Record]
) -> list[Record]:
    """Speed-ups of speculative windows by the cells that a pass decides; no pass decides more than its window."""
    return [
        record(
            f"window {window}, {name}: whole image, extrapolated",
            "speed-up over raster",
            "x",
            bootstrap_interval(
                seconds["raster"] / (seconds[f"speculative {window}"] * grid.rows * grid.columns / min(cells, window))
            ),
            baseline=1.0,
            peer=raster_passes(grid) / (grid.rows * grid.columns / min(cells, window)),
            peer_name="if time were passes",
        )
        for window in windows
        for name, cells in CELLS_PER_PASS.items()
    ]


def records_of(
    times: PairedTimes, points: dict[str, list[Point]], passes: dict[str, int], args: argparse.Namespace, command: str
) -> list[Record]:
    """Extrapolated seconds by way and their ratio, then what was measured."""
    shapes = f"random weights: {args.layers} of {LAYERS} layers, width {args.hidden}, {args.dtype}, batch {ROWS}"
    record = partial(
        record_maker("zipar", seed=args.seed, model="Emu3-8B shape", shapes=shapes, command=command), n=args.repeats
    )
    image = f"{args.grid}, window {args.window}, guidance"
    seconds = {name: whole_image(times, name, args.samples, passes[name], args.layers) for name in points}
    found = [] if "zipar" not in points else [
        record(
            f"{image}: whole image, extrapolated",
            "speed-up over raster",
            "x",
            bootstrap_interval(seconds["raster"] / seconds["zipar"]),
            baseline=1.0,
            peer=passes["raster"] / passes["zipar"],
            peer_name="if time were passes",
        )
    ]  # fmt: skip
    found += expected(seconds, grid_of(args.grid), args.speculative, record)
    for name, each in seconds.items():
        if name.startswith("speculative"):  # of a pass; an image's follows from how many there are
            found.append(record(f"{name} against raster", "time of a pass", "x", bootstrap_interval(
                each / (seconds["raster"] / passes["raster"])), baseline=1.0))  # fmt: skip
            continue
        low, value, high = (float(q) for q in np.quantile(each, [0.25, 0.5, 0.75]))
        item = f"{image}, {name}: whole image of {passes[name]:,} passes, extrapolated"
        found.append(record(item, "time of an image", "s", Estimate(value, low, high, "quartiles")))
    for name, sampled in points.items():
        for index, point in enumerate(sampled):
            item = f"{name}: {len(point.fed)} tokens fed after {PREFIX + len(point.held):,}"
            for part in ("layers", "head"):
                value = times.seconds(f"{name} {index} {part}") * 1e3
                found.append(record(item, f"time of a pass, {part}", "ms", value))
    return found


def grid_of(text: str) -> RasterGrid:
    """Of ``--grid``, with ends of rows as Emu3 has them."""
    rows, _, columns = text.partition("x")
    return RasterGrid(int(rows), int(columns), end_of_row=True)


def main(argv: list[str] | None = None) -> list[Record]:
    """Measure, print and write; returns the records."""
    parser = argparse.ArgumentParser(
        description="Raster, ZipAR and speculative decoding on a model of Emu3-8B's shape."
    )
    parser.add_argument("--grid", default="90x90", help="rows x columns in tokens")
    parser.add_argument("--window", type=int, default=7)
    parser.add_argument("--speculative", type=int, nargs="*", default=[], help="windows in cells, instead of ZipAR")
    parser.add_argument("--layers", type=int, default=2, help="of the 32, as many as fit")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=184_622)
    parser.add_argument("--samples", type=int, default=8, help="passes that are run, of each way")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if not all(part.isdecimal() for part in args.grid.partition("x")[::2]):
        parser.error(f"--grid {args.grid} must be rows x columns, such as 90x90")
    if min(args.layers, args.samples, args.repeats) < 1 or args.hidden % 512:
        parser.error("--layers, --samples and --repeats must be at least 1, and --hidden a multiple of 512")
    grid = grid_of(args.grid)
    points, passes = {"raster": raster_points(grid, args.samples)}, {"raster": raster_passes(grid)}
    for window in args.speculative:
        points[f"speculative {window}"], passes[f"speculative {window}"] = (
            speculative_points(grid, window, args.samples),
            1,
        )
    if not args.speculative:
        points["zipar"] = zipar_points(grid, args.window, args.samples)
        passes["zipar"] = zipar_passes(grid.rows, grid.columns, args.window, "eol")
    sizes = {"hidden": args.hidden, "vocabulary": args.vocabulary}
    model = new_model(args.layers, args.device, DTYPES[args.dtype], **sizes)
    model = with_grouped_attention(model)  # as in the decoder
    functions: dict[str, Callable[[], object]] = {}
    for name, sampled in points.items():
        for index, point in enumerate(sampled):
            ready = Pass(model, point, args.seed)
            functions |= {f"{name} {index} layers": ready.layers, f"{name} {index} head": ready.head}
    times = time_paired(functions, repeats=args.repeats, seed=args.seed)
    records = records_of(times, points, passes, args, command_of("zipar_shapes", argv))
    show_records(records)
    if args.out is not None:
        write_jsonl(args.out, records)
    return records


if __name__ == "__main__":
    main()
    sys.exit(0)

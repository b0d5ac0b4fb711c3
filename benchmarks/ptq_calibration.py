"""Minutes that RepAPQ takes for a network of the size that people use: repvgg_a0's shapes at 224 x 224, random weights.

    python benchmarks/ptq_calibration.py --data FOLDER --work WORK --out benchmarks/results/ptq_calibration.jsonl

FOLDER holds photographs; 256 squares of them calibrate, 100 iterations a block. Finished stages are kept in WORK, so
the command may be stopped and started again; --stages N stops it by itself after N more of them. When all are done, the
last two are calibrated once more from the border before them, and must come out the same, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor import _atomic
from tersor.bench.records import Record
from tersor.bench.runs import record_maker, report_records
from tersor.ptq.bench.speed import SHAPES, settled
from tersor.ptq.calibration import Quantized, quantize
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.images import Preprocessing, find_images
from tersor.ptq.layers import integer_layers

NAME, IMAGES = "repvgg_a0", 256
CONFIG = RepAPQConfig.of("w8a8", iterations=100, init_images=32)


class Enough(Exception):
    """As many stages as were asked for."""


def squares(folder: Path, count: int) -> Tensor:
    """``count`` crops of 224 x 224 from all photographs in turn, drawn by a seed."""
    from PIL import Image

    prepare, crops = Preprocessing(size=224), []
    generator = torch.Generator().manual_seed(0)
    files = find_images(folder)
    while len(crops) < count:
        with Image.open(files[len(crops) % len(files)]) as opened:
            left, top = (int(torch.randint(0, side - 223, (1,), generator=generator)) for side in opened.size)
            crops.append(prepare(opened.crop((left, top, left + 224, top + 224))))
    return torch.stack(crops)


def same(one: Quantized, other: Quantized) -> bool:
    """Whether all integers and scales are equal."""
    layers = integer_layers(other.model)
    return all(
        torch.equal(value, layers[name].state_dict()[key])
        for name, layer in integer_layers(one.model).items()
        for key, value in layer.state_dict().items()
    )


def main(argv: list[str] | None = None) -> int:
    """Calibrate, go on, repeat the end, and write the records; returns the exit code."""
    parser = argparse.ArgumentParser(description="Time RepAPQ's calibration at the size of a published network.")
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs of 224 pixels and more")
    parser.add_argument("--work", type=Path, required=True, help="where finished stages are kept")
    parser.add_argument("--stages", type=int, help="stop after so many more stages")
    parser.add_argument("--out", type=Path, help="write records here")
    args = parser.parse_args(argv)
    images = squares(args.data, IMAGES)
    network = settled(SHAPES[NAME], images[:32])
    kept, clock = args.work / "stages", args.work / "seconds.json"
    told: dict[str, Any] = json.loads(clock.read_text()) if clock.is_file() else {"processor": [], "wall": []}
    spent = [time.process_time(), time.perf_counter()]
    done = len(list(kept.glob("*.safetensors")))

    def on_progress(text: str) -> None:
        print(f"{text}, {time.process_time() - spent[0]:.0f} s of processor time", flush=True)
        if args.stages is not None and len(list(kept.glob("*.safetensors"))) >= done + args.stages:
            raise Enough

    def keep() -> None:
        told["processor"].append(time.process_time() - spent[0])
        told["wall"].append(time.perf_counter() - spent[1])
        _atomic.write_text(clock, json.dumps(told))

    try:
        found = quantize(network, images, CONFIG, folder=kept, on_progress=on_progress)
    except Enough:
        keep()
        return 0
    keep()
    again = args.work / "again"
    shutil.rmtree(again, ignore_errors=True)
    shutil.copytree(kept, again)
    for file in sorted(again.glob("stage-*.safetensors"))[-2:]:
        file.unlink()
    equal = same(found, quantize(network, images, CONFIG, folder=again))
    command = "python benchmarks/ptq_calibration.py --data FOLDER --work WORK"
    report_records(records(found, told, equal, command), args.out, False, lambda: print(told, "the same:", equal))
    return 0 if equal else 1


def records(found: Quantized, told: dict[str, Any], equal: bool, command: str) -> list[Record]:
    """Minutes, how many parts the run was in, and whether its end came out the same once more."""
    item = f"{NAME} at 224 x 224, {IMAGES} images, {CONFIG.iterations} iterations a block"
    record = record_maker("ptq", model=NAME, seed=CONFIG.seed, shapes="random", command=command)
    better = sum(block.after < block.before for block in found.blocks) / len(found.blocks)
    return [
        record(item, "processor time of the whole calibration", "min", sum(told["processor"]) / 60, 1),
        record(item, "wall time of the whole calibration", "min", sum(told["wall"]) / 60, 1),
        record(item, "parts that it was interrupted into", "parts", len(told["processor"]), 1),
        record(item, "end repeated from a stage border, the same bit for bit (1 yes)", "", equal, 1),
        record(item, "blocks with a smaller loss than with their first scales", "share", better, 1),
    ]


if __name__ == "__main__":
    sys.exit(main())

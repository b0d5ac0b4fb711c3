"""What `tersor images generate` does with a NAR model."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor._atomic import write_bytes
from tersor._errors import TersorError
from tersor._images import gif_bytes
from tersor._lazy import require

if TYPE_CHECKING:
    from torch import Tensor

    from tersor.grids.nar.model import NARConfig

#: Samples at once.
_BATCH = 100
#: Milliseconds of a clip's frame.
_FRAME = 150


def check_nar(folder: Path, prompt: str | None, labels: str | None, sampling: dict[str, Any], out: Path) -> NARConfig:
    """The configuration of the NAR model in ``folder``; raises `ValueError` for a request that it cannot meet."""
    from tersor.zoo.inspection import check_config, refused

    check_config(folder)
    check_config(folder / "tokenizer")
    from tersor.grids.nar.decoding import Sampling
    from tersor.grids.nar.model import NARConfig

    with refused(str(folder)):
        config: NARConfig = NARConfig.from_pretrained(folder, local_files_only=True)
    video = len(config.grid_size) == 3
    if out.suffix != (".gif" if video else ".png"):
        raise TersorError(f"--out {out} must end in {'.gif: this model makes clips' if video else '.png'}")
    if video:
        require("PIL.Image", "images")
    if (prompt is not None) != (config.condition == "text"):
        kind = "reads a --prompt" if config.condition == "text" else "takes no --prompt"
        raise TersorError(f"{folder.name} {kind}; its condition is {config.condition!r}")
    scale = sampling["guidance_scale"]
    Sampling(**{**sampling, "guidance_scale": config.default_guidance if scale is None else scale})
    if labels is not None and config.condition != "class":
        raise TersorError(f"{folder.name} takes no --labels; its condition is {config.condition!r}")
    return config


def generate_nar(
    folder: Path,
    config: NARConfig,
    conditions: Sequence[int] | Sequence[str],
    sampling: dict[str, Any],
    seed: int | Sequence[int],
    out: Path,
) -> dict[str, Any]:
    """Draw one sample for each class or prompt, write the sheet or the clip, and return the facts of the run."""
    import torch

    from tersor.grids.drawing import as_png
    from tersor.grids.nar.heads import NARForImageGeneration
    from tersor.grids.nar.pipeline import NARPipeline, TubeletTokenizer
    from tersor.grids.sampling import part_of, seeded
    from tersor.grids.tokenizer import load_tokenizer
    from tersor.zoo.inspection import load_checked

    model = load_checked(NARForImageGeneration, folder, dtype=torch.float32, local_files_only=True)
    tokenizer: Any = load_tokenizer(folder / "tokenizer")
    if len(config.grid_size) == 3:
        # Grey clips: the frames of a token are the channels of its tokenizer.
        tokenizer = TubeletTokenizer(tokenizer, tokenizer.config.channels)
    pipeline = NARPipeline(model, tokenizer, _encoder(folder) if config.condition == "text" else None)
    generator, pixels, passes = seeded(seed), [], []
    started = time.perf_counter()
    for first in range(0, len(conditions), _BATCH):
        part: Any = list(conditions[first : first + _BATCH])
        given = {"text": {"prompt": part}, "class": {"class_labels": part}, "none": {}}[config.condition]
        count = len(part) if config.condition == "none" else 1
        own = part_of(generator, first, first + _BATCH)
        made = pipeline(**given, generator=own, num_images_per_prompt=count, output_type="pt", **sampling)
        pixels.append(made.images if made.frames is None else made.frames)
        passes.append(made.forward_passes)
    seconds, found = time.perf_counter() - started, torch.cat(pixels)
    scale = max(1, 112 // found.shape[-1])
    write_bytes(out, as_png(found, scale=scale) if found.ndim == 4 else as_gif(found, scale=scale))
    return {
        "model": folder.name, "method": "nar", "images": len(conditions), "conditions": list(conditions),
        "passes": passes, "raster_passes": math.prod(config.grid_size), "seconds": seconds, "seed": seed,
        "out": str(out),
    }  # fmt: skip


def _encoder(folder: Path) -> Any:
    """Of a zoo model that reads captions."""
    from tersor import zoo

    if folder.name not in zoo.names() or zoo.path(folder.name) != folder:
        raise TersorError(f"{folder} reads text of an encoder that is not known here; use NARPipeline in Python")
    return zoo.load_text_encoder(folder.name)


def as_gif(clips: Tensor, *, scale: int = 1) -> bytes:
    """Clips ``[n, frames, 1 or 3, height, width]`` from 0 to 1, side by side, as one moving picture."""
    from tersor.grids.drawing import as_png

    images: Any = require("PIL.Image", "images")
    frames = [images.open(io.BytesIO(as_png(frame, scale=scale))) for frame in clips.unbind(1)]
    return gif_bytes(frames, _FRAME)


def summary_line(facts: dict[str, Any], as_json: bool) -> str:
    """What the command prints."""
    if as_json:
        return json.dumps(facts)
    passes = sum(facts["passes"]) / len(facts["passes"])
    return (
        f"{facts['images']} samples in {facts['seconds']:.1f} s, {passes:.0f} forward passes each instead of "
        f"{facts['raster_passes']}: {facts['out']}"
    )

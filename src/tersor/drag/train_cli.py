"""`tersor train drag` and `tersor drag clip`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from tersor._errors import TersorError
from tersor._lazy import require
from tersor._options import FOLDER
from tersor.bench.runs import AsJson


class DiffusersCommand(TyperCommand):
    """A command whose options may be written as in diffusers' scripts: ``--train_batch_size``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click."""
        spelled = []
        for each in args:
            name, equals, value = each.partition("=")
            spelled.append((name.replace("_", "-") if name.startswith("--") else name) + equals + value)
        return super().parse_args(ctx, spelled)


def train_drag(
    pretrained_model_name_or_path: Annotated[
        str, typer.Option(help="Zoo name, folder or hub name of a Stable Video Diffusion pipeline.")
    ],
    train_data_dir: Annotated[
        Path,
        typer.Option(help="Clips: frames/CLIP/* and masks/CLIP/* of whole numbers, or VIPSeg's or DAVIS' folders."),
    ],
    output_dir: Annotated[
        Path, typer.Option(metavar=FOLDER, help="Folder of checkpoints and branch; an interrupted run resumes.")
    ],
    max_train_steps: Annotated[int, typer.Option(help="Updates of the weights.")],
    controlnet_model_name_or_path: Annotated[
        Path | None, typer.Option(help="Folder of a branch to go on from; left out, one is made of the UNet.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="What entities are known by: vae, diffusion:FOLDER (the paper's) or dino:FOLDER."),
    ] = None,
    num_frames: Annotated[int, typer.Option(help="Of a clip, from its first on.")] = 14,
    height: Annotated[int, typer.Option(help="That frames are resized to.")] = 320,
    width: Annotated[int, typer.Option(help="That frames are resized to.")] = 576,
    train_batch_size: Annotated[int, typer.Option(help="Clips of a process in a forward pass.")] = 1,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Forward passes of an update.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="The highest one.")] = 1e-5,
    lr_scheduler: Annotated[str, typer.Option(help="A name of diffusers, such as cosine.")] = "constant_with_warmup",
    lr_warmup_steps: Annotated[int, typer.Option(help="Updates in which the rate rises.")] = 500,
    mixed_precision: Annotated[str, typer.Option(help="'no', 'fp16' or 'bf16'.")] = "no",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")
    ] = False,
    rank: Annotated[int, typer.Option(help="Of adapters on the branch's attention; 0 trains all of the branch.")] = 0,
    loss_mask: Annotated[
        str, typer.Option(help="What the loss is over: 'area' or 'mean' of the entities, or 'none', everything.")
    ] = "area",
    entity_dropout: Annotated[
        float, typer.Option(help="Chance of an entity to be left out of a clip; the authors leave out none.")
    ] = 0.5,
    conditioning_dropout_prob: Annotated[
        float, typer.Option(help="Chance to leave out the picture's embedding, its latents, or both.")
    ] = 0.1,
    fps: Annotated[int, typer.Option(help="Frames a second of the clips.")] = 7,
    motion_bucket_id: Annotated[int, typer.Option(help="SVD's amount of motion.")] = 128,
    checkpointing_steps: Annotated[
        int, typer.Option(help="Updates between checkpoints; 0 keeps the last alone.")
    ] = 500,
    checkpoints_total_limit: Annotated[int, typer.Option(help="Checkpoints that are kept.")] = 2,
    validation_steps: Annotated[int, typer.Option(help="Updates between videos of the first clip; 0 makes none.")] = 0,
    dataloader_num_workers: Annotated[int, typer.Option(help="Processes that read clips.")] = 0,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train DragAnything's control branch on clips; on many GPUs by `accelerate launch -m tersor train drag`.

    Example: tersor train drag --pretrained-model-name-or-path svd/ --train-data-dir clips/ --output-dir run/
        --max-train-steps 10000
    """
    require("diffusers", "drag")
    require("accelerate", "drag")
    from tersor.drag.data import ClipFolder
    from tersor.drag.loading import load_pipeline
    from tersor.drag.training import DragTraining, train

    plan = DragTraining(
        max_train_steps=max_train_steps, train_batch_size=train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps, learning_rate=learning_rate,
        lr_scheduler=lr_scheduler, lr_warmup_steps=lr_warmup_steps, mixed_precision=mixed_precision,
        gradient_checkpointing=gradient_checkpointing, rank=rank, loss_mask=loss_mask, entity_dropout=entity_dropout,
        conditioning_dropout_prob=conditioning_dropout_prob, fps=fps, motion_bucket_id=motion_bucket_id,
        checkpointing_steps=checkpointing_steps, checkpoints_total_limit=checkpoints_total_limit,
        validation_steps=validation_steps, dataloader_num_workers=dataloader_num_workers, seed=seed,
    )  # fmt: skip
    if rank:
        require("peft", "rl")
    for name, value in (("num_frames", num_frames), ("height", height), ("width", width)):
        if value < 1:
            raise TersorError(f"{name}={value} must be at least 1")
    clips = ClipFolder(train_data_dir, num_frames, height, width)
    if clips.left_out:
        name, why = next(iter(clips.left_out.items()))
        typer.echo(f"left out: {len(clips.left_out)} clips, such as {name}: {why}", err=True)
    pipe = load_pipeline(
        pretrained_model_name_or_path, controlnet_model_name_or_path, features, "cpu", begin=True
    )  # fmt: skip
    facts = {
        "model": pretrained_model_name_or_path, "data": str(train_data_dir.resolve()),
        "size": [num_frames, height, width],
    }  # fmt: skip
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=as_json or not sys.stderr.isatty()) as progress:
        task = progress.add_task("training", total=max_train_steps)

        def shown(step: int, steps: int, loss: float) -> None:
            progress.update(task, completed=step, description=f"loss {loss:.4f}")

        losses = train(pipe, clips, plan, output_dir, facts=facts, on_step=shown)
    last = losses[-max(1, len(losses) // 10) :]
    loss, branch = sum(last) / len(last), output_dir / "controlnet"
    if as_json:
        typer.echo(json.dumps({"updates": len(losses), "clips": len(clips), "loss": loss, "controlnet": str(branch)}))
        return
    typer.echo(f"{len(losses):,} updates on {len(clips):,} clips, loss of the last tenth {loss:.4f}: {branch}")


def clip(
    video: Annotated[Path, typer.Option(help="A folder of frames, or an animated .gif or .webp.")],
    masks: Annotated[
        Path, typer.Option(help="Folder of a mask a frame: a palette's places, or grey of 8 or 16 bits; 0 is nothing.")
    ],
    out: Annotated[Path, typer.Option(metavar=FOLDER, help="Folder of the data; clips that are there stay.")],
    name: Annotated[str | None, typer.Option(help="Of the clip; the video's if left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Add a video with its masks to the data of `tersor train drag`.

    Example: tersor drag clip --video judo/images --masks judo/masks --out clips/ --name judo
    """
    require("PIL.Image", "drag")
    from tersor.drag.data import write_clip

    called = name or video.stem
    if called in ("", ".", "..") or Path(called).name != called:
        raise TersorError(f"--name {called!r} must be the name of a folder")
    frames = write_clip(video, masks, out, called)
    facts = {"frames": frames, "clip": called, "out": str(out)}
    typer.echo(json.dumps(facts) if as_json else f"{frames} frames: {out / 'frames' / called}")

"""`tersor drag`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor._console import spinner
from tersor._errors import TersorError
from tersor._lazy import require
from tersor._options import FOLDER
from tersor.bench.runs import AsJson, show
from tersor.drag.train_cli import clip

if TYPE_CHECKING:
    from tersor.drag.metrics import Motion
    from tersor.drag.scene import Scene
    from tersor.drag.tracking import PointTracker

drag = typer.Typer(help="Move entities of a picture along paths (DragAnything).", no_args_is_help=True)

drag.command()(clip)

SceneFile = Annotated[Path, typer.Argument(metavar="SCENE", help="A scene.json, or the authors' demo.json.")]


@drag.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE", help="The authors' .safetensors of the branch.")],
    out: Annotated[Path, typer.Option(metavar=FOLDER, help="Where the branch is saved.")],
    fold: Annotated[
        bool,
        typer.Option("--fold-residual-accumulation", help="Put the factors of its residuals into the weights."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read the authors' control branch, or one of svd-temporal-controlnet, and save it for `render`.

    Example: tersor drag convert diffusion_pytorch_model.safetensors --out branch/
    """
    require("diffusers", "drag")
    from tersor.drag.convert import convert_draganything

    with spinner() as status:
        status.update("reading")
        branch = convert_draganything(checkpoint, fold_residual_accumulation=fold)
        branch.save_pretrained(out)
    parameters = sum(each.numel() for each in branch.parameters())
    facts = {"parameters": parameters, "residual_multipliers": branch.config.residual_multipliers, "out": str(out)}
    typer.echo(json.dumps(facts) if as_json else f"{parameters:,} parameters: {out}")


@drag.command()
def render(
    scene: SceneFile,
    image: Annotated[Path, typer.Option(help="The first frame, of the scene's size.")],
    model: Annotated[str, typer.Option(help="Zoo name, folder or hub name of a Stable Video Diffusion pipeline.")],
    controlnet: Annotated[
        Path | None,
        typer.Option(help="Folder of the control branch, see `tersor drag convert`; left out, the model's own."),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="What entities are known by, as in the training: vae, diffusion:FOLDER or dino:FOLDER."),
    ] = None,
    height: Annotated[int, typer.Option(help="Of the video in pixels.")] = 320,
    width: Annotated[int, typer.Option(help="Of the video in pixels.")] = 576,
    frames: Annotated[int, typer.Option(help="Of the video; 0 takes the scene's.")] = 0,
    steps: Annotated[int, typer.Option(help="Passes in which noise is taken away.")] = 25,
    scale: Annotated[float, typer.Option(help="Factor of what the branch adds; 0 is plain SVD.")] = 1.0,
    guidance: Annotated[float, typer.Option(help="Guidance of the last frame; 1 is none.")] = 3.0,
    motion_bucket: Annotated[int, typer.Option(help="SVD's amount of motion.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute, such as cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="The video, a .gif.")] = Path("video.gif"),
    as_json: AsJson = False,
) -> None:
    """Make a video in which the entities of a scene follow their paths.

    Example: tersor drag render scene.json --image first.png --model svd/ --controlnet branch/ --out video.gif
    """
    require("diffusers", "drag")
    from tersor._atomic import write_bytes
    from tersor._images import gif_bytes, read_picture
    from tersor.drag.scene import Scene

    if out.suffix != ".gif":
        raise TersorError(f"--out {out} must end in .gif")
    if steps < 1 or frames < 0:
        raise TersorError(f"--steps {steps} must be at least 1, and --frames {frames} must not be negative")
    moved, picture = Scene.load(scene, num_frames=frames or None), read_picture(image, option="--image", extra="drag")
    if picture.size != (moved.width, moved.height):
        raise TersorError(f"--image {image} is {picture.size}, the scene {(moved.width, moved.height)}")
    import torch

    from tersor.drag.loading import load_pipeline

    with spinner() as status:
        status.update("loading")
        pipe = load_pipeline(model, controlnet, features, device)
        status.update(f"{moved.num_frames} frames in {steps} steps")
        made = pipe(
            picture, moved, height, width, num_inference_steps=steps, controlnet_conditioning_scale=scale,
            max_guidance_scale=guidance, motion_bucket_id=motion_bucket, generator=torch.Generator().manual_seed(seed),
            decode_chunk_size=8,
        ).frames[0]  # fmt: skip
    write_bytes(out, gif_bytes(made, 140))
    facts = {"frames": len(made), "width": width, "height": height, "steps": steps, "seed": seed, "out": str(out)}
    typer.echo(json.dumps(facts) if as_json else f"{len(made)} frames of {width} x {height}: {out}")


@drag.command()
def evaluate(
    scene: SceneFile,
    video: Annotated[Path, typer.Option(help="An animated .gif, or a folder of frames.")],
    tracker: Annotated[str, typer.Option(help="What follows the entities: 'template' or 'lucas-kanade'.")] = "template",
    as_json: AsJson = False,
) -> None:
    """How far the entities of a video are from their paths, in pixels of the video, beside a still picture.

    Example: tersor drag evaluate scene.json --video video.gif
    """
    from tersor._images import read_frames
    from tersor.drag.scene import Scene
    from tersor.drag.tracking import TRACKERS

    if tracker not in TRACKERS:
        raise TersorError(f"--tracker {tracker!r} must be one of {[*TRACKERS]}")
    frames = read_frames(video, option="--video")
    rows = measured(Scene.load(scene, num_frames=len(frames)), frames, TRACKERS[tracker]())
    if as_json:
        typer.echo(json.dumps({name: vars(motion) for name, motion in rows.items()}))
        return
    columns = ["", "ObjMC", "median", "visible", "EPE", "points seen"]
    show(columns, [
        [name, *(f"{value:.2f}" for value in (m.objmc_mean, m.objmc_median, m.objmc_visible, m.epe)), str(m.seen)]
        for name, m in rows.items()
    ])  # fmt: skip


def measured(scene: Scene, frames: list[Any], tracker: PointTracker) -> dict[str, Motion]:
    """The motion of a video's entities and of a still picture's, against the scene's paths."""
    import numpy as np

    from tersor.drag.metrics import motion_error, static

    width, height = frames[0].size
    resized = scene.resized(width, height)
    wanted = np.stack([each.centers(len(frames)) for each in resized.entities], axis=1)
    circles = [each.circle() for each in resized.entities]
    starts = np.array([(circle.x, circle.y) for circle in circles])
    wanted = wanted - wanted[:1] + starts  # as displacements, wherever the path is anchored
    pixels = np.stack([np.asarray(frame, dtype=np.float64) / 255 for frame in frames])
    found, _ = tracker.track(pixels, starts)
    return {
        "video": motion_error(found, wanted, (width, height)),
        "still picture": motion_error(static(starts, len(frames)), wanted, (width, height)),
    }

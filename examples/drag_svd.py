"""Train DragAnything's branch and drag: accelerate launch examples/drag_svd.py --data clips/ --out run/.

`tersor train drag` and `tersor drag render` do the same from the command line; this is how the parts are put together,
to be changed. Clips are folders of frames beside folders of masks, see `tersor drag clip`.
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image

from tersor.drag.data import ClipFolder
from tersor.drag.features import VaeFeatures
from tersor.drag.loading import new_branch
from tersor.drag.pipeline import DragAnythingPipeline
from tersor.drag.training import DragTraining, train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="stabilityai/stable-video-diffusion-img2vid")
parser.add_argument("--data", type=Path, required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--steps", type=int, default=20_000)
parser.add_argument("--frames", type=int, default=14)
parser.add_argument("--height", type=int, default=320)
parser.add_argument("--width", type=int, default=576)
parser.add_argument("--passes", type=int, default=25)
args = parser.parse_args()

on_gpu = torch.cuda.is_available()
svd = StableVideoDiffusionPipeline.from_pretrained(args.model)
# What entities are known by: the latents of the VAE need no further model, and say little more than colours.
# `DiffusionFeatures` of a Stable Diffusion pipeline are what the paper takes.
features = VaeFeatures(svd.vae, args.model)
pipe = DragAnythingPipeline.from_pipe(svd, controlnet=new_branch(svd, features), entity_feature_extractor=features)

clips = ClipFolder(args.data, args.frames, args.height, args.width)
plan = DragTraining(
    max_train_steps=args.steps,
    mixed_precision="bf16" if on_gpu else "no",
    gradient_checkpointing=on_gpu,
    gradient_accumulation_steps=2 if on_gpu else 1,
    checkpointing_steps=500,
)
losses = train(pipe, clips, plan, args.out, on_step=lambda step, steps, loss: print(f"{step} of {steps}: {loss:.4f}"))

clip = clips[0]
video = pipe(
    Image.fromarray(clip.frames[0]),
    clip.scene(),
    args.height,
    args.width,
    num_inference_steps=args.passes,
    generator=torch.Generator().manual_seed(0),
).frames[0]
video[0].save(args.out / "first.gif", save_all=True, append_images=video[1:], duration=140, loop=0)
print(f"branch: {args.out / 'controlnet'}, a video of the first clip: {args.out / 'first.gif'}")

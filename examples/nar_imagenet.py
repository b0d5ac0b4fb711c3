"""ImageNet classes by a released NAR model: python examples/nar_imagenet.py nar_l.pt vq_ds16_c2i.pt.

It takes 31 forward passes instead of 256. The first file is one of NAR's class-to-image checkpoints, the second is
LlamaGen's image tokenizer.
"""

import argparse

import torch
from PIL import Image

from tersor.grids.nar.convert import convert_nar
from tersor.grids.nar.pipeline import NARPipeline
from tersor.grids.vq import convert_vq

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("tokenizer")
parser.add_argument("--classes", type=int, nargs="+", default=[207, 360, 387, 974, 88, 979, 417, 279])
parser.add_argument("--guidance", type=float, default=4.0, help="2 is what the paper evaluates with")
parser.add_argument("--top-k", type=int, default=2000, help="0 is all, as the paper evaluates")
parser.add_argument("--grid", type=int, nargs=2, default=(16, 16), help="that the model was trained for")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="nar.png")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = convert_nar(args.model, grid_size=tuple(args.grid)).to(device)
pipeline = NARPipeline(model, convert_vq(args.tokenizer).to(device))
out = pipeline(
    args.classes,
    guidance_scale=args.guidance,
    top_k=args.top_k,
    generator=torch.Generator(device).manual_seed(args.seed),
)
rows, columns = model.config.grid_size
print(f"{out.forward_passes} forward passes instead of {rows * columns}")
width, height = out.images[0].size
sheet = Image.new("RGB", (width * len(out.images), height))
for number, image in enumerate(out.images):
    sheet.paste(image, (number * width, 0))
sheet.save(args.out)

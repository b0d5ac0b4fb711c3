"""A network of timm as an ONNX file of integers: python examples/repapq_timm.py photos/ repvgg_a0.onnx."""

import argparse
from pathlib import Path

import timm
from timm.data import resolve_model_data_config

from tersor.ptq.calibration import quantize
from tersor.ptq.config import RepAPQConfig
from tersor.ptq.images import Preprocessing, read_folder
from tersor.ptq.onnx_export import export_float, export_quantized, run, session

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("photos", type=Path, help="a few hundred images; no classes needed")
parser.add_argument("out", type=Path)
parser.add_argument("--model", default="repvgg_a0.rvgg_in1k", help="RepVGG or MobileOne, by timm's name")
parser.add_argument("--bits", default="w8a8")
parser.add_argument("--iterations", type=int, default=400, help="of each block")
args = parser.parse_args()

model = timm.create_model(args.model, pretrained=True).eval()
found = resolve_model_data_config(model)
prepare = Preprocessing(
    size=found["input_size"][-1],
    share=found["crop_pct"],
    interpolation=found["interpolation"],
    mean=found["mean"],
    deviation=found["std"],
)
images = read_folder(args.photos, prepare, count=256, seed=0)

config = RepAPQConfig.of(args.bits, iterations=args.iterations)
result = quantize(model, images, config, folder=args.out.with_suffix(".stages"), on_progress=print)
integers = export_quantized(result.model, images, args.out)
floats = export_float(result.merged, images, args.out.with_suffix(".float.onnx"))

same = run(session(integers.path), images).argmax(1) == run(session(floats.path), images).argmax(1)
print(f"{same.float().mean():.1%} of {len(images)} images are classified as in floating point")
print(f"{integers.nbytes / floats.nbytes:.1%} of its size; layers in floating point: {integers.float_layers}")

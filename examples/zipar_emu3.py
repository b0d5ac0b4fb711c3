"""An image by Emu3 in a tenth of the forward passes: python examples/zipar_emu3.py "a lighthouse at dusk"."""

import argparse

import torch
from transformers import Emu3ForConditionalGeneration, Emu3Processor

import tersor

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt")
parser.add_argument("--model", default="BAAI/Emu3-Gen-hf")
parser.add_argument("--window", type=int, default=7, help="of the columns; all of them is raster decoding")
parser.add_argument("--adaptive", action="store_true", help="verify the first token of every row")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="emu3.png")
args = parser.parse_args()

processor = Emu3Processor.from_pretrained(args.model)
model = Emu3ForConditionalGeneration.from_pretrained(args.model, dtype=torch.bfloat16, device_map="auto")

quality = "lowres, bad anatomy, text, error, cropped, worst quality, jpeg artifacts, signature, watermark, blurry."
settings = {"return_for_image_generation": True, "return_tensors": "pt"}
inputs = processor(text=[args.prompt + " masterpiece, film grained, best quality."], **settings).to(model.device)
negative = processor(text=[quality], **settings).to(model.device)
rows, columns = map(int, inputs["image_sizes"][0])

torch.manual_seed(args.seed)
out = tersor.zipar_generate(
    model,
    inputs,
    window_size=args.window,
    adaptive=args.adaptive,
    guidance_scale=3.0,
    negative_prompt_ids=negative["input_ids"],
    negative_prompt_attention_mask=negative["attention_mask"],
    do_sample=True,
    top_k=2048,
    return_dict_in_generate=True,
)
print(f"{out.forward_passes} forward passes instead of {rows * (columns + 1)}")
image_ids = out.sequences[:, inputs["input_ids"].shape[1] :]
pixels = model.decode_image_tokens(image_tokens=image_ids, height=rows, width=columns)
processor.postprocess(list(pixels.float()), return_tensors="PIL.Image.Image")["pixel_values"][0].save(args.out)

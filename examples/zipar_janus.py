"""Images by Janus-Pro in about half of the forward passes: python examples/zipar_janus.py "a red bicycle"."""

import argparse

import torch
from transformers import JanusForConditionalGeneration, JanusProcessor

import tersor

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt")
parser.add_argument("--model", default="deepseek-community/Janus-Pro-1B")
parser.add_argument("--window", type=int, default=12, help="of 24 columns; 24 is raster decoding")
parser.add_argument("--images", type=int, default=1)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="janus")
args = parser.parse_args()

processor = JanusProcessor.from_pretrained(args.model)
model = JanusForConditionalGeneration.from_pretrained(args.model, dtype=torch.bfloat16, device_map="auto")

messages = [{"role": "user", "content": [{"type": "text", "text": args.prompt}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=prompt, generation_mode="image", return_tensors="pt").to(model.device)

torch.manual_seed(args.seed)
out = tersor.zipar_generate(
    model,
    inputs,
    window_size=args.window,
    do_sample=True,
    num_return_sequences=args.images,
    return_dict_in_generate=True,
)
print(f"{out.forward_passes} forward passes instead of {out.sequences.shape[1]}")
pixels = model.decode_image_tokens(out.sequences).float()
images = processor.postprocess(list(pixels), return_tensors="PIL.Image.Image")["pixel_values"]
for number, image in enumerate(images):
    image.save(f"{args.out}-{number}.png")
